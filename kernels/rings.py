"""Messages of a batch into a ring of bytes, in one pass: see `server/edges/ring.py` for the ring."""

from __future__ import annotations

import numpy as np
from numba import njit
from numpy.typing import NDArray

from kernels.checks import require_array

SKIP = -1
"""In place of a length: the next message begins at the start of the ring."""


def lay_messages(
    ring: NDArray[np.uint8],
    at: int,
    done: int,
    heads: NDArray[np.uint8],
    common: NDArray[np.uint8],
    rows: NDArray[np.uint8],
    offsets: NDArray[np.int64],
    which: NDArray[np.int64],
) -> tuple[int, int]:
    """Writes message i = heads[i] + common + rows[offsets[which[i]]:offsets[which[i] + 1]], as many as fit, in order.

    A message takes 8 bytes for its length (little-endian int64) and its own, rounded up to 8, in one piece: where
    it does not fit before the end of the ring, -1 stands there and it begins at the start.

    Args:
        ring: uint8[C], C a positive multiple of 8; written.
        at, done: bytes that were written and read since the beginning; at a multiple of 8, done <= at <= done + C.
        heads: uint8[n, H]. common: uint8[M]. rows: uint8[R].
        offsets: int64[B + 1], ascending, from 0 or more to R at most. which: int64[n], each in [0, B).

    Returns:
        ``at`` behind the last message that was written, and how many were.

    Raises:
        ValueError: an argument has the wrong dtype, shape or range; the message names it. Nothing was written.

    Cost: reads and writes each byte of a message once.
    """
    _check(ring, at, done, heads, common, rows, offsets, which)
    ends, written = _lay(ring, at, done, heads, common, rows, offsets, which)
    return int(ends), int(written)


def lay_messages_reference(
    ring: NDArray[np.uint8],
    at: int,
    done: int,
    heads: NDArray[np.uint8],
    common: NDArray[np.uint8],
    rows: NDArray[np.uint8],
    offsets: NDArray[np.int64],
    which: NDArray[np.int64],
) -> tuple[int, int]:
    """What :func:`lay_messages` does, one message after the other."""
    _check(ring, at, done, heads, common, rows, offsets, which)
    written = 0
    for head, row in zip(heads, which, strict=True):
        message = np.concatenate([head, common, rows[offsets[row] : offsets[row + 1]]])
        need = 8 + (len(message) + 7) // 8 * 8
        place = at % len(ring)
        skipped = len(ring) - place if place + need > len(ring) else 0
        if at + skipped + need - done > len(ring):
            break
        if skipped:
            ring[place : place + 8] = np.frombuffer(np.int64(SKIP).tobytes(), np.uint8)
            place = 0
        ring[place : place + 8] = np.frombuffer(np.int64(len(message)).tobytes(), np.uint8)
        ring[place + 8 : place + 8 + len(message)] = message
        at += skipped + need
        written += 1
    return at, written


def _check(
    ring: NDArray[np.uint8],
    at: int,
    done: int,
    heads: NDArray[np.uint8],
    common: NDArray[np.uint8],
    rows: NDArray[np.uint8],
    offsets: NDArray[np.int64],
    which: NDArray[np.int64],
) -> None:
    require_array("ring", ring, np.uint8, (None,))
    require_array("heads", heads, np.uint8, (None, None))
    require_array("common", common, np.uint8, (None,))
    require_array("rows", rows, np.uint8, (None,))
    require_array("offsets", offsets, np.int64, (None,))
    require_array("which", which, np.int64, (len(heads),))
    if not len(ring) or len(ring) % 8:
        raise ValueError(f"ring: a positive multiple of 8 bytes wanted, got {len(ring)}")
    if at % 8 or not 0 <= done <= at <= done + len(ring):
        raise ValueError(f"at, done: a multiple of 8 within the ring of {len(ring)} bytes wanted, got {at}, {done}")
    if len(which) and not 0 <= int(which.min()) <= int(which.max()) < len(offsets) - 1:
        raise ValueError(f"which: each must lie in [0, {len(offsets) - 1})")
    if len(offsets) and (offsets[0] < 0 or offsets[-1] > len(rows) or (offsets[1:] < offsets[:-1]).any()):
        raise ValueError(f"offsets: must ascend within [0, {len(rows)}]")


@njit(cache=True, nogil=True)
def _put_length(ring: NDArray[np.uint8], place: int, length: int) -> None:
    for i in range(8):
        ring[place + i] = np.uint8((length >> (8 * i)) & 0xFF)


@njit(cache=True, nogil=True)
def _copy(source: NDArray[np.uint8], target: NDArray[np.uint8]) -> None:
    for k in range(source.shape[0]):  # between slices: with offsets added it would go byte by byte
        target[k] = source[k]


@njit(cache=True, nogil=True)
def _lay(
    ring: NDArray[np.uint8],
    at: int,
    done: int,
    heads: NDArray[np.uint8],
    common: NDArray[np.uint8],
    rows: NDArray[np.uint8],
    offsets: NDArray[np.int64],
    which: NDArray[np.int64],
) -> tuple[int, int]:
    capacity, own = ring.shape[0], heads.shape[1] + common.shape[0]
    for i in range(heads.shape[0]):
        begin, end = offsets[which[i]], offsets[which[i] + 1]
        length = own + (end - begin)
        need = 8 + ((length + 7) >> 3 << 3)
        place = at % capacity
        skipped = capacity - place if place + need > capacity else 0
        if at + skipped + need - done > capacity:
            return at, i
        if skipped:
            _put_length(ring, place, SKIP)
            place = 0
        _put_length(ring, place, length)
        place += 8
        behind = place + heads.shape[1]
        _copy(heads[i], ring[place:behind])
        _copy(common, ring[behind : behind + common.shape[0]])
        _copy(rows[begin:end], ring[behind + common.shape[0] : place + length])
        at += skipped + need
    return at, heads.shape[0]
