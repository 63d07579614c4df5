"""Decides, event by event and in order, what may change a stream, and moves its liveness.

This is the one loop that is sequential by nature: whether an event counts depends on the
events before it (epochs, ends, duplicates). Everything else about a batch is column work.

Rules (invariants 3 and 5):
  started    of a higher epoch begins a session (ending the one before); of the current, still
             open epoch it only refreshes attributes.
  heartbeat  renews the lease iff its media sequence is larger than any before, until
             min(event time, applied time) + lease: a skewed clock can never lengthen a lease.
  ended      of the current or a higher epoch ends the stream for good, however late it arrives. Its value, if
             not 0, is a time: then only the current session ends, and only without later proof of media.
  impression of the current or a lower epoch is taken in any state and changes nothing.
  the rest   needs an open session; epoch 0 means the current one.
  A lower epoch never changes a higher one. Only applied events use up their sequence number.
  A batch that may change its producer's own streams only is refused the others before all this.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numba import njit
from numpy.typing import NDArray

from kernels.dedup import DUPLICATE, TOO_OLD, window_check, window_mark

# States of a row.
FREE, LIVE, SUSPECT, ENDED = 0, 1, 2, 3

# Kinds of event (numbers of the proto's oneof cases).
STARTED, HEARTBEAT, END, VIEWER_COUNT, JOINED, LEFT, WATCHED, CHATTED, LIKED = (
    10,
    11,
    12,
    13,
    14,
    15,
    16,
    17,
    18,
)
FOLLOWED, SHARED, BID, PURCHASED, REPORTED, MODERATED, IMPRESSION = 19, 20, 21, 22, 23, 24, 25
INTERACTIONS = (JOINED, LEFT, CHATTED, LIKED, FOLLOWED, SHARED)
"""Kinds that carry nothing but how many."""

# Verdicts: 0 applied, else the number of the proto's RejectCode.
APPLIED = 0
TOO_LATE, TOO_FAR_IN_FUTURE = 5, 6
UNKNOWN_STREAM, EPOCH_BACKWARDS, EPOCH_UNKNOWN, STREAM_ENDED = 13, 14, 15, 16
DUPLICATE_SEQUENCE, SEQUENCE_TOO_OLD, CAPACITY = 17, 18, 19
RENEWED_SINCE, NOT_OWNER, TOO_MANY_STREAMS = 21, 22, 23

# What a moderation does (numbers of the proto's Moderated.Action) and the bits it sets.
BLOCK, UNBLOCK, MARK_SPAM, CLEAR_SPAM = 1, 2, 3, 4
MODERATED_BLOCKED, MODERATED_SPAM = np.uint8(1), np.uint8(2)


class LivenessColumns(NamedTuple):
    """The liveness columns of the table, C rows; changed in place."""

    state: NDArray[np.uint8]
    epoch: NDArray[np.int64]
    lease_expires_ms: NDArray[np.int64]
    media_sequence: NDArray[np.int64]
    started_ms: NDArray[np.int64]
    ended_ms: NDArray[np.int64]
    moderation: NDArray[np.uint8]
    owner: NDArray[np.uint64]


class Fenced(NamedTuple):
    """Outcome per event.

    codes: uint8[n], APPLIED or a reject code.
    new_session: bool[n], a started that began a session.
    ended_epoch: int64[n], the epoch that this event ended (by itself or by superseding it); -1 none.
    renewed: bool[n], heartbeats that renewed a lease.
    """

    codes: NDArray[np.uint8]
    new_session: NDArray[np.bool_]
    ended_epoch: NDArray[np.int64]
    renewed: NDArray[np.bool_]


@njit(cache=True, nogil=True)
def _admit(
    kind: int,
    epoch: int,
    time_ms: int,
    applied_ms: int,
    value: float,
    state: int,
    current: int,
    proven_ms: int,
    max_lateness_ms: int,
    max_future_ms: int,
) -> int:
    """Reject code of an event with these columns against a row with this state, epoch and newest proof of media."""
    if time_ms > applied_ms + max_future_ms:
        return TOO_FAR_IN_FUTURE
    if kind != END and time_ms < applied_ms - max_lateness_ms:
        return TOO_LATE
    if kind == STARTED:
        if state == FREE or epoch > current:
            return APPLIED
        if epoch < current:
            return EPOCH_BACKWARDS
        return STREAM_ENDED if state == ENDED else APPLIED
    if state == FREE:
        return UNKNOWN_STREAM
    if kind == IMPRESSION:
        return EPOCH_UNKNOWN if epoch > current else APPLIED
    if kind == MODERATED and epoch == 0:
        return APPLIED
    if epoch != 0 and epoch < current:
        return EPOCH_BACKWARDS
    conditional = kind == END and value != 0.0
    if epoch > current:
        return APPLIED if kind == END and not conditional else EPOCH_UNKNOWN
    if state == ENDED and kind != MODERATED:
        return STREAM_ENDED
    return RENEWED_SINCE if conditional and proven_ms > value else APPLIED


@njit(cache=True, nogil=True)
def _fence(
    columns: LivenessColumns,
    slots: NDArray[np.int32],
    kinds: NDArray[np.uint8],
    epochs: NDArray[np.int64],
    time_ms: NDArray[np.int64],
    values: NDArray[np.float64],
    media_sequences: NDArray[np.int64],
    producers: NDArray[np.int32],
    sequences: NDArray[np.uint64],
    applied_ms: NDArray[np.int64],
    highest: NDArray[np.uint64],
    window_bits: NDArray[np.uint64],
    lease_ms: int,
    max_lateness_ms: int,
    max_future_ms: int,
    owner: int,
    own_only: bool,
) -> tuple[NDArray[np.uint8], NDArray[np.bool_], NDArray[np.int64], NDArray[np.bool_]]:
    n = slots.shape[0]
    codes = np.zeros(n, dtype=np.uint8)
    new_session = np.zeros(n, dtype=np.bool_)
    ended_epoch = np.full(n, -1, dtype=np.int64)
    renewed = np.zeros(n, dtype=np.bool_)
    for i in range(n):
        seen = window_check(highest, window_bits, producers[i], sequences[i])
        if seen != 0:
            codes[i] = DUPLICATE_SEQUENCE if seen == DUPLICATE else SEQUENCE_TOO_OLD
            continue
        s = slots[i]
        kind = kinds[i]
        if s < 0:
            codes[i] = CAPACITY if kind == STARTED else UNKNOWN_STREAM
            continue
        if own_only and columns.state[s] != FREE and columns.owner[s] != owner:
            codes[i] = NOT_OWNER
            continue
        codes[i] = _admit(
            kind, epochs[i], time_ms[i], applied_ms[i], values[i], columns.state[s], columns.epoch[s],
            columns.lease_expires_ms[s] - lease_ms, max_lateness_ms, max_future_ms,
        )  # fmt: skip
        if codes[i] != APPLIED:
            continue
        window_mark(highest, window_bits, producers[i], sequences[i])
        proof_ms = min(time_ms[i], applied_ms[i])
        if kind == STARTED:
            if columns.state[s] == FREE or epochs[i] > columns.epoch[s]:
                if columns.state[s] == LIVE or columns.state[s] == SUSPECT:
                    ended_epoch[i] = columns.epoch[s]
                new_session[i] = True
                columns.state[s] = LIVE
                columns.epoch[s] = epochs[i]
                columns.lease_expires_ms[s] = proof_ms + lease_ms
                columns.media_sequence[s] = -1
                columns.started_ms[s] = time_ms[i]
                columns.ended_ms[s] = 0
                columns.owner[s] = owner
        elif kind == HEARTBEAT:
            if media_sequences[i] > columns.media_sequence[s]:
                columns.media_sequence[s] = media_sequences[i]
                if proof_ms + lease_ms > columns.lease_expires_ms[s]:
                    columns.lease_expires_ms[s] = proof_ms + lease_ms
                    renewed[i] = True
                if columns.lease_expires_ms[s] > applied_ms[i]:
                    columns.state[s] = LIVE
        elif kind == END:
            ended_epoch[i] = epochs[i]
            columns.state[s] = ENDED
            columns.epoch[s] = epochs[i]
            columns.ended_ms[s] = applied_ms[i]
        elif kind == MODERATED:
            action = int(values[i])
            if action == BLOCK:
                columns.moderation[s] |= MODERATED_BLOCKED
            elif action == UNBLOCK:
                columns.moderation[s] &= ~MODERATED_BLOCKED
            elif action == MARK_SPAM:
                columns.moderation[s] |= MODERATED_SPAM
            else:
                columns.moderation[s] &= ~MODERATED_SPAM
    return codes, new_session, ended_epoch, renewed


def fence_events(
    columns: LivenessColumns,
    slots: NDArray[np.int32],
    kinds: NDArray[np.uint8],
    epochs: NDArray[np.int64],
    time_ms: NDArray[np.int64],
    values: NDArray[np.float64],
    media_sequences: NDArray[np.int64],
    producers: NDArray[np.int32],
    sequences: NDArray[np.uint64],
    applied_ms: NDArray[np.int64],
    highest: NDArray[np.uint64],
    window_bits: NDArray[np.uint64],
    *,
    lease_ms: int,
    max_lateness_ms: int,
    max_future_ms: int,
    owner: int = 0,
    own_only: bool = False,
) -> Fenced:
    """Walks n events in order, changing ``columns`` and the producers' windows in place.

    Args:
        slots: int32[n], -1 where the stream has no row (and, for a started, no row is left).
        values: float64[n]; of a moderation its action, of an end the time that makes it conditional (0: none).
        producers: int32[n], rows of ``highest`` uint64[P] and ``window_bits`` uint64[P, WORDS].
        applied_ms: int64[n], non-decreasing.
        owner: uint64 that stands for the producer of all n events; sessions that begin get it.
        own_only: refuse events of sessions with another owner.

    Raises:
        ValueError: a column's length differs from that of ``slots``.

    Cost: one random row of about 60 bytes per event.
    """
    n = slots.shape[0]
    for name, column in (
        ("kinds", kinds), ("epochs", epochs), ("time_ms", time_ms), ("values", values),
        ("media_sequences", media_sequences), ("producers", producers),
        ("sequences", sequences), ("applied_ms", applied_ms),
    ):  # fmt: skip
        if column.shape != (n,):
            raise ValueError(f"{name}: shape ({n},) wanted, got {column.shape}")
    return Fenced(
        *_fence(
            columns,
            slots,
            kinds,
            epochs,
            time_ms,
            values,
            media_sequences,
            producers,
            sequences,
            applied_ms,
            highest,
            window_bits,
            lease_ms,
            max_lateness_ms,
            max_future_ms,
            np.uint64(owner),
            own_only,
        )
    )


assert TOO_OLD == 2 and DUPLICATE == 1  # what _fence tells apart
