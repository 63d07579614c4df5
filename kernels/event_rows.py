"""What every decoder of events writes: checked rows of columns, and which events a slower way must look at.

The checks are those of `server.live.event_checks.check_event`, which alone knows codes and words: an event that fails
here is only marked as refused, and shown to it.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np
from numba import njit
from numpy.typing import NDArray

from kernels.fence import (
    BID,
    BLOCK,
    CLEAR_SPAM,
    END,
    HEARTBEAT,
    IMPRESSION,
    MODERATED,
    PURCHASED,
    REPORTED,
    STARTED,
    VIEWER_COUNT,
    WATCHED,
)
from kernels.idmap import FNV_BASIS, FNV_PRIME, ID_BYTES, finish_hash

MAX_AMOUNT_MINOR = 1_000_000_000_000
MAX_COUNT = 1_000_000_000
MAX_WATCH_SECONDS = 86_400.0
MAX_TIME_MS = 4_102_444_800_000  # 2100-01-01
MAX_I63 = (1 << 63) - 1

KEPT, REFUSED, STARTS, ENDS, IMPRESSIONS = 0, 1, 2, 3, 4
"""Places in `Rows.counts`."""


class Names(NamedTuple):
    """k names side by side in ``names``, and the number that each stands for."""

    names: NDArray[np.uint8]
    starts: NDArray[np.int64]
    lengths: NDArray[np.int64]
    numbers: NDArray[np.float64]


class Rows(NamedTuple):
    """Room for n events; the first counts[KEPT] rows are filled, in the order in which the events came.

    place int32[n] (among the events, its index), sequence uint64[n], ids uint8[n, 64], id_lengths uint8[n], kind
    uint8[n], epoch int64[n], time_ms int64[n], value float64[n], media_sequence int64[n], viewer_hash uint64[n]: as
    `server.live.events.EventColumns` has them. Only where the kind has them, else rubbish: reason_at, reason_length
    int64[n] (bytes of the source, of an end), served_ms, verify_by_ms int64[n] (of an impression).
    refused int32[n]: the first counts[REFUSED] are places of events that were not kept. counts int64[5].
    """

    place: NDArray[np.int32]
    sequence: NDArray[np.uint64]
    ids: NDArray[np.uint8]
    id_lengths: NDArray[np.uint8]
    kind: NDArray[np.uint8]
    epoch: NDArray[np.int64]
    time_ms: NDArray[np.int64]
    value: NDArray[np.float64]
    media_sequence: NDArray[np.int64]
    viewer_hash: NDArray[np.uint64]
    reason_at: NDArray[np.int64]
    reason_length: NDArray[np.int64]
    served_ms: NDArray[np.int64]
    verify_by_ms: NDArray[np.int64]
    refused: NDArray[np.int32]
    counts: NDArray[np.int64]


(
    KIND, SEQUENCE, EPOCH, TIME_MS, STREAM_AT, STREAM_LENGTH, VIEWER_AT, VIEWER_LENGTH, FIRST, SINCE_MS, VERIFY_BY_MS,
    FRACTION, TEXT_AT, TEXT_LENGTH, VERSION_AT, VERSION_LENGTH,
) = range(16)  # fmt: skip
N_READ = 16
"""Columns of `check_rows`' input, what the source says of an event. KIND: 0 not known. SEQUENCE, EPOCH: the bits of a
uint64. …_AT, …_LENGTH: where a text lies. FIRST: media_sequence, count, amount_minor or action, by kind. SINCE_MS: of
an end, and served_ms of an impression. FRACTION: the bits of a float32, seconds or propensity. TEXT: reason, currency
or request_id. VERSION: model_version."""


def pack_names(numbers: Mapping[str, float]) -> Names:
    """Names and their numbers as the kernels take them."""
    names = [name.encode() for name in numbers]
    lengths = np.array([len(name) for name in names], np.int64)
    return Names(
        np.frombuffer(b"".join(names) or b"\0", np.uint8).copy(),
        np.cumsum(lengths) - lengths,
        lengths,
        np.array(list(numbers.values()), np.float64),
    )


@njit(cache=True, nogil=True)
def equal_bytes(a: NDArray[np.uint8], a_at: int, b: NDArray[np.uint8], b_at: int, length: int) -> bool:
    """Whether two spans of ``length`` bytes are the same."""
    for i in range(length):  # noqa: SIM110 - numba compiles the loop, not any()
        if a[a_at + i] != b[b_at + i]:
            return False
    return True


@njit(cache=True, nogil=True)
def number_of(names: Names, data: NDArray[np.uint8], at: int, length: int) -> float:
    """The number of the name in ``data[at : at + length]``; NaN where it has none."""
    for k in range(names.numbers.shape[0]):
        if names.lengths[k] == length and equal_bytes(names.names, names.starts[k], data, at, length):
            return names.numbers[k]
    return np.nan


@njit(cache=True, nogil=True)
def _check(data: NDArray[np.uint8], read: NDArray[np.int64], currencies: Names) -> tuple[NDArray[Any], ...]:
    n = read.shape[0]
    places, sequences, ids = np.empty(n, np.int32), np.empty(n, np.uint64), np.empty((n, ID_BYTES), np.uint8)
    id_lengths, kinds, epochs = np.empty(n, np.uint8), np.empty(n, np.uint8), np.empty(n, np.int64)
    times_ms, values, media_sequences = np.empty(n, np.int64), np.empty(n, np.float64), np.empty(n, np.int64)
    viewer_hashes, reason_at, reason_lengths = np.empty(n, np.uint64), np.empty(n, np.int64), np.empty(n, np.int64)
    served_ms, verify_by_ms = np.empty(n, np.int64), np.empty(n, np.int64)
    refused, counts, bits = np.empty(n, np.int32), np.zeros(5, np.int64), np.empty(1, np.int32)
    fraction = bits.view(np.float32)
    row, refusals = 0, 0
    for i in range(n):
        kind, sequence, epoch, time_ms = read[i, KIND], read[i, SEQUENCE], read[i, EPOCH], read[i, TIME_MS]
        id_length, first, text_length = read[i, STREAM_LENGTH], read[i, FIRST], read[i, TEXT_LENGTH]
        sound = kind != 0 and 1 <= id_length <= ID_BYTES and sequence != 0 and 0 < time_ms < MAX_TIME_MS
        sound = sound and read[i, VIEWER_LENGTH] <= ID_BYTES and epoch >= 0
        value = 0.0
        if kind == VIEWER_COUNT:
            sound = sound and first <= MAX_COUNT
            value = float(first)
        elif kind == WATCHED:
            bits[0] = read[i, FRACTION]
            value = float(fraction[0])
            sound = sound and 0.0 <= value <= MAX_WATCH_SECONDS  # false for NaN, too
        elif kind == BID or kind == PURCHASED:  # noqa: SIM109 - no list in a compiled loop
            value = float(first) * number_of(currencies, data, read[i, TEXT_AT], text_length)
            sound = sound and 0 <= first <= MAX_AMOUNT_MINOR and not np.isnan(value)
        elif kind == REPORTED:
            sound = sound and text_length <= ID_BYTES
            value = 1.0
        elif kind == MODERATED:
            sound = sound and BLOCK <= first <= CLEAR_SPAM
            value = float(first)
        elif kind == STARTED or kind == HEARTBEAT:  # noqa: SIM109 - no list in a compiled loop
            sound = sound and epoch != 0
        elif kind == END:
            since_ms = read[i, SINCE_MS]
            sound = sound and epoch != 0 and text_length <= ID_BYTES and 0 <= since_ms < MAX_TIME_MS
            value = float(since_ms)
        elif kind == IMPRESSION:
            bits[0] = read[i, FRACTION]
            sound = sound and epoch != 0 and text_length <= ID_BYTES and read[i, VERSION_LENGTH] <= ID_BYTES
            sound = sound and 0.0 <= fraction[0] <= 1.0  # false for NaN, too
            sound = sound and 0 < read[i, SINCE_MS] < MAX_TIME_MS and 0 < read[i, VERIFY_BY_MS] < MAX_TIME_MS
        else:
            sound = sound and first <= MAX_COUNT
            value = float(max(first, 1))
        if not sound:
            refused[refusals] = i
            refusals += 1
            continue
        places[row], sequences[row], kinds[row], epochs[row] = i, np.uint64(sequence), kind, epoch
        times_ms[row], values[row], id_lengths[row], media_sequences[row] = time_ms, value, id_length, 0
        at = read[i, STREAM_AT]
        for k in range(id_length):
            ids[row, k] = data[at + k]
        for k in range(id_length, ID_BYTES):
            ids[row, k] = 0
        viewer_hashes[row] = 0
        if read[i, VIEWER_LENGTH] > 0:  # as `hash_ids` does it; a call that takes an array would cost more
            at, h = read[i, VIEWER_AT], FNV_BASIS
            for k in range(read[i, VIEWER_LENGTH]):
                h = (h ^ np.uint64(data[at + k])) * FNV_PRIME
            viewer_hashes[row] = max(finish_hash(h), np.uint64(1))
        if kind == HEARTBEAT:
            media_sequences[row] = MAX_I63 if first < 0 else first  # beyond 63 bits it is as large as it gets
        elif kind == STARTED:
            counts[STARTS] += 1
        elif kind == END:
            counts[ENDS] += 1
            reason_at[row], reason_lengths[row] = read[i, TEXT_AT], text_length
        elif kind == IMPRESSION:
            counts[IMPRESSIONS] += 1
            served_ms[row], verify_by_ms[row] = read[i, SINCE_MS], read[i, VERIFY_BY_MS]
        row += 1
    counts[KEPT], counts[REFUSED] = row, refusals
    return (
        places, sequences, ids, id_lengths, kinds, epochs, times_ms, values, media_sequences, viewer_hashes,
        reason_at, reason_lengths, served_ms, verify_by_ms, refused, counts,
    )  # fmt: skip


def check_rows(data: NDArray[np.uint8], read: NDArray[np.int64], currencies: Names) -> Rows:
    """Checked rows of what a source says of n events; the checks are those of `server.live.event_checks.check_event`.

    Of a start only the header is checked.

    Args:
        data: uint8[m], what the texts lie in. read: int64[n, N_READ], see there; its texts are inside of ``data``.

    Raises:
        ValueError: ``read`` has another shape.

    Cost: one pass; about 150 bytes written per event.
    """
    if read.ndim != 2 or read.shape[1] != N_READ:
        raise ValueError(f"read: [n, {N_READ}] wanted, got {list(read.shape)}")
    return Rows(*_check(data, read, currencies))
