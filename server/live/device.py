"""The device side of the live table: columns on the GPU, changed in the order in which the host decided.

The host decides what happened (fence, ids, leases) and keeps identity and liveness; this class has copies of those
rows, and alone keeps what is counted in a session and what is derived from that. docs/adr/0004 says why.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from kernels import counters_gpu, features_gpu, rows_gpu, rules_gpu
from kernels.backend import Backend
from kernels.counters import HALF_LIVES_MS, N_COUNTERS, Grown
from kernels.idmap import id_words
from kernels.programs import FeatureProgram, RuleProgram
from server.live.columns import SKETCH_REGISTERS, Columns
from server.live.staging import Staging


class Observed(NamedTuple):
    """n events for gauges and sketches, in order. viewers: -1 not a viewer count. viewer_hash: 0 none."""

    slots: NDArray[np.int32]
    time_ms: NDArray[np.int64]
    viewers: NDArray[np.float32]
    viewer_hash: NDArray[np.uint64]
    is_chat: NDArray[np.bool_]


def _no_slots() -> NDArray[np.int32]:
    return np.zeros(0, np.int32)


@dataclass
class Changes:
    """What `DeviceTable.apply` does at once; the fields are taken in this order.

    liveness, identity: rows to copy from the host's columns. cleared: rows whose session columns become zero.
    forgotten: rows that hold other sessions. grown, observed: events, none of a session before a row was cleared.
    """

    liveness: NDArray[np.int32] = field(default_factory=_no_slots)
    identity: NDArray[np.int32] = field(default_factory=_no_slots)
    cleared: NDArray[np.int32] = field(default_factory=_no_slots)
    forgotten: NDArray[np.int32] = field(default_factory=_no_slots)
    grown: Grown | None = None
    observed: Observed | None = None


class DeviceTable:
    """Columns of ``capacity`` rows on the backend's device, and torch views of them made once (``tensors``).

    On the CPU backend the same kernels run in Triton's interpreter: for tests. One thread uses it.

    Args:
        deterministic: counters add up in the order of the events, so that the log gives the same bits again.

    Attributes:
        rows: high-water mark of the rows that were ever uploaded.
        columns: name → array of ``backend.xp``. tensors: name → the torch tensor over the same memory.
    """

    def __init__(self, backend: Backend, capacity: int, deterministic: bool = True) -> None:
        self.backend, self.capacity = backend, capacity
        self.deterministic = deterministic
        self.rows = 0
        c, xp = capacity, backend.xp
        words = rows_gpu.ID_WORDS
        shapes: dict[str, tuple[Any, tuple[int, ...]]] = {
            "state": (np.uint8, (c,)), "moderation": (np.uint8, (c,)), "lease_expires_ms": (np.int64, (c,)),
            "epoch": (np.int64, (c,)), "started_ms": (np.int64, (c,)),
            "creator": (np.int32, (c,)), "language": (np.int32, (c,)), "category": (np.int32, (c,)),
            "region": (np.int32, (c,)), "age_rating": (np.int32, (c,)), "id_lengths": (np.uint8, (c,)),
            "id_words": (np.int64, (c, words)),
            "last_event_ms": (np.int64, (c,)), "viewers": (np.float32, (c,)), "viewers_ms": (np.int64, (c,)),
            "counters": (np.float32, (c, N_COUNTERS, len(HALF_LIVES_MS))),
            "viewer_registers": (np.uint8, (c, SKETCH_REGISTERS)),
            "chatter_registers": (np.uint8, (c, SKETCH_REGISTERS)),
            "rule_bits": (np.int32, (c,)), "boost": (np.float32, (c,)), "trend": (np.float32, (c,)),
            "exposures": (np.int32, (c,)), "winner": (np.int32, (c,)),
        }  # fmt: skip
        self.columns: dict[str, Any] = {name: xp.zeros(shape, dtype) for name, (dtype, shape) in shapes.items()}
        self.columns["rule_bits"][:] = rules_gpu.UNASSESSED
        self.columns["trend"][:] = np.nan
        self.columns["winner"][:] = -1
        empty_id = id_words(np.zeros((1, 8 * words), np.uint8))
        self.columns["id_words"][:] = int(empty_id[0, 0])
        self.tensors: dict[str, torch.Tensor] = {name: backend.view(column) for name, column in self.columns.items()}
        t = self.tensors
        self._liveness = rows_gpu.LivenessTarget(*(t[name] for name in rows_gpu.LivenessTarget._fields))
        self._identity = rows_gpu.IdentityTarget(*(t[name] for name in rows_gpu.IdentityTarget._fields))
        self._derived = rows_gpu.DerivedTarget(*(t[name] for name in rows_gpu.DerivedTarget._fields))
        self._features_of = features_gpu.FeatureColumns(*(t[name] for name in features_gpu.FeatureColumns._fields))
        self._row_state = rules_gpu.RowState(*(t[name] for name in rules_gpu.RowState._fields))
        self._session = {
            name: t[name]
            for name in (
                "last_event_ms", "viewers", "viewers_ms", "counters", "viewer_registers", "chatter_registers",
            )
        }  # fmt: skip
        self.staging = Staging(backend)
        self._scratch: dict[str, torch.Tensor] = {}

    # --- writing ------------------------------------------------------------------------------

    def upload_rows(self, slots: NDArray[np.int32], host: Columns) -> None:
        """Copies rows int32[n] of the host's identity and liveness columns. See `apply`."""
        self.apply(Changes(liveness=slots, identity=slots), host)

    def apply(self, changes: Changes, host: Columns) -> None:
        """Takes changes over: one copy to the device, then a kernel or two per kind of change.

        Does not wait: whatever is launched next on the same stream sees the result.

        Raises:
            ValueError: a slot is outside the table; nothing was changed.

        Cost: bytes over PCIe are 32 per liveness row, 96 per identity row, 4 per cleared or forgotten row,
        16 per counter that an event adds to, 25 per event.
        """
        liveness, identity = np.unique(changes.liveness), np.unique(changes.identity)
        cleared, forgotten = np.unique(changes.cleared), np.unique(changes.forgotten)
        grown, observed = changes.grown, changes.observed
        for name, slots in (
            ("liveness", liveness), ("identity", identity), ("cleared", cleared), ("forgotten", forgotten),
            ("observed", _no_slots() if observed is None else observed.slots),
        ):  # fmt: skip
            if len(slots) and not (int(slots.min()) >= 0 and int(slots.max()) < self.capacity):
                raise ValueError(f"{name}: slots 0 to {self.capacity - 1} allowed")
        if grown is not None and len(grown.keys) and int(grown.keys.max()) >= self.capacity * N_COUNTERS:
            raise ValueError(f"grown: keys below {self.capacity * N_COUNTERS} allowed")
        parts: dict[str, NDArray[Any]] = {}
        if len(cleared):
            parts["cleared"] = cleared
        if len(forgotten):
            parts["forgotten"] = forgotten
        if grown is not None and len(grown.keys):
            parts |= grown._asdict()
        if observed is not None and len(observed.slots):
            parts |= observed._asdict()
        layout: dict[str, tuple[Any, tuple[int, ...]]] = {name: (p.dtype, p.shape) for name, p in parts.items()}
        if len(liveness):
            layout["liveness"] = (rows_gpu.LIVENESS, (len(liveness),))
        if len(identity):
            layout["identity"] = (rows_gpu.IDENTITY, (len(identity),))
            self.rows = max(self.rows, int(identity[-1]) + 1)
        if not layout:
            return
        staged = self.staging.lay_out(layout)
        for name, part in parts.items():
            staged[name][...] = part
        if len(liveness):
            _pack_liveness(staged["liveness"], liveness, host)
        if len(identity):
            _pack_identity(staged["identity"], identity, host)
        self._run(self.staging.send())

    def _run(self, sent: dict[str, torch.Tensor]) -> None:
        if "liveness" in sent:
            rows_gpu.store_liveness(sent["liveness"], self._liveness)
        if "identity" in sent:
            rows_gpu.store_identity(sent["identity"], self._identity)
        if "cleared" in sent:
            counters_gpu.clear_rows(sent["cleared"], **self._session)
        if "forgotten" in sent:
            rows_gpu.forget_rows(sent["forgotten"], self._derived)
        if "keys" in sent:
            counters_gpu.scatter_decayed(
                self.tensors["counters"], sent["keys"], sent["amounts"], deterministic=self.deterministic
            )
        if "slots" in sent:
            t = self.tensors
            counters_gpu.observe(
                *(sent[name] for name in Observed._fields),
                last_event_ms=t["last_event_ms"], viewers_now=t["viewers"], viewers_ms=t["viewers_ms"],
                viewer_registers=t["viewer_registers"], chatter_registers=t["chatter_registers"], winner=t["winner"],
            )  # fmt: skip

    def move_landmark(self, old_ms: int, new_ms: int, rows: int) -> None:
        """Rescales the counters of the first ``rows`` rows; see kernels.counters.move_landmark."""
        counters_gpu.move_landmark(self.tensors["counters"][:rows], old_ms, new_ms)

    # --- deriving -----------------------------------------------------------------------------

    def load_features(self, program: FeatureProgram) -> tuple[torch.Tensor, torch.Tensor]:
        """The program's tables on the device, for `features`."""
        return self._put(program.codes), self._put(program.numbers)

    def load_rules(self, program: RuleProgram, n_features: int) -> rules_gpu.RuleTables:
        """The program's tables on the device, for `assess`; nothing is reported yet (see `set_reported`)."""
        tables = {name: self._put(table) for name, table in program._asdict().items()}
        return rules_gpu.RuleTables(**tables, reported=self._put(np.zeros(n_features, np.uint8)))

    def set_reported(self, tables: rules_gpu.RuleTables, reported: NDArray[np.bool_]) -> None:
        """Takes over bool[F], see `FeatureSet.reported`."""
        self.staging.lay_out({"reported": (np.bool_, reported.shape)})["reported"][...] = reported
        tables.reported.copy_(self.staging.send()["reported"])

    def features(
        self,
        program: tuple[torch.Tensor, torch.Tensor],
        slots: torch.Tensor | None,
        n: int,
        now_ms: int,
        landmark_ms: int,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """values float32[n, F] and states uint8[n, F] of rows ``slots`` int32[n], None: of the first n.

        They are overwritten by the next call.
        """
        codes, numbers = program
        values = self._room("values", torch.float32, n, codes.shape[0])
        states = self._room("states", torch.uint8, n, codes.shape[0])
        features_gpu.compute(
            self._features_of, slots, codes, numbers, now_ms=now_ms, landmark_ms=landmark_ms,
            values=values, states=states,
        )  # fmt: skip
        return values, states

    def assess(
        self, values: torch.Tensor, slots: torch.Tensor | None, tables: rules_gpu.RuleTables, now_ms: int
    ) -> None:
        """Rule bits and boosts of the rows whose features these are, in place; no row twice."""
        rules_gpu.assess(
            values, slots, tables, self._row_state, now_ms=now_ms,
            rule_bits=self.tensors["rule_bits"], boost=self.tensors["boost"],
        )  # fmt: skip

    def refresh_built_in(self, slots: torch.Tensor, now_ms: int) -> None:
        """Blocks, spam marks and ends of rows int32[n] show in their rule bits at once."""
        rules_gpu.refresh_built_in(slots, self._row_state, now_ms=now_ms, rule_bits=self.tensors["rule_bits"])

    def send_slots(self, slots: NDArray[np.int32]) -> torch.Tensor:
        """int32[n] on the device, valid until anything else is sent."""
        self.staging.lay_out({"rows": (np.int32, slots.shape)})["rows"][...] = slots
        return self.staging.send()["rows"]

    def to_host(self, tensor: torch.Tensor) -> NDArray[Any]:
        """A copy on the host. Waits for the device."""
        return np.array(tensor.cpu().numpy())

    # --- memory -------------------------------------------------------------------------------

    def nbytes_per_row(self) -> int:
        """Device memory of one row."""
        return sum(int(column[:1].nbytes) for column in self.columns.values())

    def _put(self, table: NDArray[Any]) -> torch.Tensor:
        return self.backend.view(self.backend.xp.asarray(np.array(table)))

    def _room(self, name: str, dtype: torch.dtype, rows: int, width: int) -> torch.Tensor:
        """A part [rows, width] of a buffer that grows by doubling."""
        held = self._scratch.get(name)
        if held is None or held.numel() < rows * width:
            size = 1 << max(0, rows * width - 1).bit_length()
            numpy_dtype = np.float32 if dtype == torch.float32 else np.uint8
            held = self._scratch[name] = self.backend.view(self.backend.xp.empty(size, numpy_dtype))
        return held[: rows * width].view(rows, width)


def _pack_liveness(records: NDArray[Any], slots: NDArray[np.int32], host: Columns) -> None:
    records["slot"] = slots
    for name in ("state", "moderation", "lease_expires_ms", "epoch", "started_ms"):
        records[name] = getattr(host, name)[slots]


def _pack_identity(records: NDArray[Any], slots: NDArray[np.int32], host: Columns) -> None:
    records["slot"] = slots
    for name in ("creator", "language", "category", "region", "age_rating"):
        records[name] = getattr(host, name)[slots]
    records["id_length"] = host.id_lengths[slots]
    records["id_words"] = id_words(host.ids[slots])
