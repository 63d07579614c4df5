"""The columns of the live table: one preallocated array per field, row = slot."""

from __future__ import annotations

from dataclasses import dataclass, fields

import numpy as np
from numpy.typing import NDArray

from kernels.counters import HALF_LIVES_MS, N_COUNTERS
from kernels.fence import LivenessColumns
from kernels.idmap import ID_BYTES

SKETCH_REGISTERS = 128


@dataclass(frozen=True)
class Columns:
    """All state that the event log determines, C rows; changed in place by the table only.

    Recovery from the same log gives these arrays bit for bit (invariant 6). What is derived from
    them on a tick (features, rule bits, scores) lives elsewhere.
    """

    # identity
    ids: NDArray[np.uint8]  # [C, 64] zero-padded
    id_lengths: NDArray[np.uint8]  # [C] 0 in a free row
    generation: NDArray[np.uint32]  # [C] how often the row was freed
    creator: NDArray[np.int32]  # [C] interned; 0 none
    language: NDArray[np.int32]  # [C] interned; 0 unknown
    category: NDArray[np.int32]  # [C] interned; 0 unknown
    region: NDArray[np.int32]  # [C] interned; 0 everywhere
    age_rating: NDArray[np.int32]  # [C] years
    embedding: NDArray[np.float32]  # [C, D] unit length or zero; owned by the search engine
    # liveness
    state: NDArray[np.uint8]  # [C] FREE, LIVE, SUSPECT, ENDED
    epoch: NDArray[np.int64]  # [C]
    lease_expires_ms: NDArray[np.int64]  # [C]
    media_sequence: NDArray[np.int64]  # [C] -1 before the first heartbeat of a session
    started_ms: NDArray[np.int64]  # [C] event time
    ended_ms: NDArray[np.int64]  # [C] applied time of the end, or lease end + grace; 0 not ended
    moderation: NDArray[np.uint8]  # [C] bits MODERATED_*
    owner: NDArray[np.uint64]  # [C] `owner_of` the producer that began the session
    # what happened in this session
    last_event_ms: NDArray[np.int64]  # [C]
    viewers: NDArray[np.float32]  # [C] last reported
    viewers_ms: NDArray[np.int64]  # [C] when; 0 never
    counters: NDArray[np.float32]  # [C, N_COUNTERS, 3] forward-decayed
    viewer_registers: NDArray[np.uint8]  # [C, 128] HyperLogLog
    chatter_registers: NDArray[np.uint8]  # [C, 128]

    @classmethod
    def allocate(cls, capacity: int, embedding: NDArray[np.float32], with_sessions: bool = True) -> Columns:
        """Zeroed columns of ``capacity`` rows around the engine's embedding matrix float32[C, D].

        with_sessions: False gives what happened in the sessions no rows: a GPU keeps it. Who reads it on the
            host all the same must fail, not find zeros.
        """
        c, s = capacity, capacity if with_sessions else 0
        return cls(
            ids=np.zeros((c, ID_BYTES), np.uint8),
            id_lengths=np.zeros(c, np.uint8),
            generation=np.zeros(c, np.uint32),
            creator=np.zeros(c, np.int32),
            language=np.zeros(c, np.int32),
            category=np.zeros(c, np.int32),
            region=np.zeros(c, np.int32),
            age_rating=np.zeros(c, np.int32),
            embedding=embedding,
            state=np.zeros(c, np.uint8),
            epoch=np.zeros(c, np.int64),
            lease_expires_ms=np.zeros(c, np.int64),
            media_sequence=np.zeros(c, np.int64),
            started_ms=np.zeros(c, np.int64),
            ended_ms=np.zeros(c, np.int64),
            moderation=np.zeros(c, np.uint8),
            owner=np.zeros(c, np.uint64),
            last_event_ms=np.zeros(s, np.int64),
            viewers=np.zeros(s, np.float32),
            viewers_ms=np.zeros(s, np.int64),
            counters=np.zeros((s, N_COUNTERS, len(HALF_LIVES_MS)), np.float32),
            viewer_registers=np.zeros((s, SKETCH_REGISTERS), np.uint8),
            chatter_registers=np.zeros((s, SKETCH_REGISTERS), np.uint8),
        )

    def liveness(self) -> LivenessColumns:
        """The liveness columns as the fence kernel takes them (the same memory)."""
        return LivenessColumns(
            self.state, self.epoch, self.lease_expires_ms, self.media_sequence,
            self.started_ms, self.ended_ms, self.moderation, self.owner,
        )  # fmt: skip

    def clear_sessions(self, slots: NDArray[np.int32]) -> None:
        """Forgets what happened in the rows' sessions; int32[n]."""
        for name in SESSION:
            getattr(self, name)[slots] = 0

    def clear_row(self, slot: int) -> None:
        """Zeroes identity and liveness but not the generation, so that a free row is the same whatever it held.

        Its session is cleared by the accumulators, its embedding by the search engine: the caller asks both.
        """
        for name in _HOST:
            getattr(self, name)[slot] = 0

    def nbytes_per_row(self) -> int:
        """Memory of one row."""
        return sum(getattr(self, field.name)[:1].nbytes for field in fields(self))


SESSION = ("last_event_ms", "viewers", "viewers_ms", "counters", "viewer_registers", "chatter_registers")
_HOST = tuple(f.name for f in fields(Columns) if f.name not in ("generation", "embedding", *SESSION))
