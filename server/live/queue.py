"""Session columns on a GPU: what the table decides is collected and taken over in one go before anyone reads."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from kernels import fence
from kernels.counters import N_COUNTERS, Grown, grow_events
from server.live.accumulators import FIRST_COUNTER, SECOND_COUNTER, Counted
from server.live.columns import Columns
from server.live.device import Changes, DeviceTable, Observed
from server.live.features import Features, FeatureSet

MOST_EVENTS = 100_000
"""Events that wait at most; then they are taken over although nobody reads."""


class DeviceQueue:
    """`Accumulators` in front of a `DeviceTable`; used by the thread that owns the table.

    Nothing is stale: whoever reads the device's columns calls `flush` first, on the same thread. Batches between
    two reads cost one copy and one set of launches, and counters still add up in the order of the events.

    Args:
        host: the live table's columns, read when rows are copied: the newest content of a row is what counts.
    """

    def __init__(self, device: DeviceTable, host: Columns) -> None:
        self.device = device
        self._host = host
        self._liveness: list[NDArray[np.int32]] = []
        self._identity: list[NDArray[np.int32]] = []
        self._forgotten: list[NDArray[np.int32]] = []
        self._cleared: list[NDArray[np.int32]] = []
        self._clearing: list[NDArray[np.int32]] = []  # cleared after the events that wait, before those to come
        self._grown: list[Grown] = []
        self._observed: list[Observed] = []
        self._waiting = 0
        self._mark = np.zeros(device.capacity, np.bool_)
        self._programs: dict[str, tuple[torch.Tensor, torch.Tensor]] = {}

    def count(self, events: Counted, landmark_ms: int) -> None:
        """See `Accumulators`."""
        self._settle_cleared()
        current = events.current
        slots, kind, value = events.slots[current], events.kind[current], events.value[current]
        time_ms, viewer_hash = events.time_ms[current], events.viewer_hash[current]
        ones = np.ones(len(slots), np.float64)
        grown = grow_events(
            slots, FIRST_COUNTER[kind], value, SECOND_COUNTER[kind], ones, time_ms, landmark_ms
        )  # fmt: skip
        viewers = np.where(kind == fence.VIEWER_COUNT, value, -1.0).astype(np.float32)
        self._grown.append(grown)
        self._observed.append(Observed(slots, time_ms, viewers, viewer_hash, kind == fence.CHATTED))
        self._waiting += len(slots)
        if self._waiting >= MOST_EVENTS:
            self.flush()

    def clear_sessions(self, slots: NDArray[np.int32]) -> None:
        """See `Accumulators`."""
        if len(slots):
            self._clearing.append(slots)

    def move_landmark(self, old_ms: int, new_ms: int, rows: int) -> None:
        """See `Accumulators`. Events that wait were grown for the old landmark, so they go first."""
        self.flush()
        self.device.move_landmark(old_ms, new_ms, rows)

    def liveness_changed(self, slots: NDArray[np.int32]) -> None:
        """See `Accumulators`."""
        if len(slots):
            self._liveness.append(slots)

    def identity_changed(self, slots: NDArray[np.int32]) -> None:
        """See `Accumulators`."""
        if len(slots):
            self._identity.append(slots)

    def forget(self, slots: NDArray[np.int32]) -> None:
        """These rows hold other sessions: what was derived about them goes; int32[n]."""
        if len(slots):
            self._forgotten.append(slots)

    def features(self, features: FeatureSet, slots: NDArray[np.int32], now_ms: int, landmark_ms: int) -> Features:
        """See `Accumulators`. Brings them to the host, so it waits for the device: not for the request path."""
        self.flush()
        if features.schema not in self._programs:
            self._programs[features.schema] = self.device.load_features(features.program())
        program = self._programs[features.schema]
        at = self.device.send_slots(slots)
        values, states = self.device.features(program, at, len(slots), now_ms, landmark_ms)
        return Features(self.device.to_host(values), self.device.to_host(states))

    def viewers(self, rows: int) -> NDArray[np.float32]:
        """See `Accumulators`. Waits for the device: once a tick at most."""
        self.flush()
        return self.device.to_host(self.device.tensors["viewers"][:rows])

    def column(self, name: str) -> Any:
        """See `Accumulators`."""
        self.flush()
        return self.device.columns[name]

    def flush(self) -> None:
        """Takes over everything that waits. Call before reading the device's columns."""
        self._settle_cleared()
        changes = Changes(
            liveness=_join(self._liveness),
            identity=_join(self._identity),
            cleared=_join(self._cleared),
            forgotten=_join(self._forgotten),
            grown=Grown._make(map(np.concatenate, zip(*self._grown))) if self._grown else None,
            observed=Observed._make(map(np.concatenate, zip(*self._observed))) if self._observed else None,
        )
        for waiting in (self._liveness, self._identity, self._cleared, self._forgotten):
            waiting.clear()
        self._grown.clear()
        self._observed.clear()
        self._waiting = 0
        self.device.apply(changes, self._host)

    def _settle_cleared(self) -> None:
        """Drops what waits for rows that were cleared since: the device clears rows before it counts."""
        if not self._clearing:
            return
        slots = _join(self._clearing)
        self._clearing.clear()
        self._cleared.append(slots)
        if not self._waiting:
            return
        self._mark[slots] = True
        for i, grown in enumerate(self._grown):
            kept = ~self._mark[grown.keys // N_COUNTERS]
            self._grown[i] = Grown(grown.keys[kept], grown.amounts[kept])
        for i, observed in enumerate(self._observed):
            kept = ~self._mark[observed.slots]
            self._observed[i] = Observed._make(column[kept] for column in observed)
        self._mark[slots] = False


def _join(parts: list[NDArray[np.int32]]) -> NDArray[np.int32]:
    return np.concatenate(parts) if parts else np.zeros(0, np.int32)
