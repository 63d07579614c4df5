"""Which (producer, sequence) pairs were applied: an exact sliding window per producer.

Per producer the highest applied sequence and a ring of WINDOW bits below it. A resend is
recognised inside the window; below it nothing is known, so it is refused as too old.
Numbering may jump ahead by any amount. 8 KiB per producer.
"""

from __future__ import annotations

import numpy as np
from numba import njit
from numpy.typing import NDArray

WINDOW = 65_536
WORDS = WINDOW // 64

FRESH, DUPLICATE, TOO_OLD = 0, 1, 2


@njit(cache=True, nogil=True)
def window_check(highest: NDArray[np.uint64], bits: NDArray[np.uint64], row: int, sequence: np.uint64) -> int:
    """FRESH, DUPLICATE or TOO_OLD for ``sequence`` of producer ``row``; changes nothing.

    highest uint64[P], bits uint64[P, WORDS]. One load in most cases.
    """
    top = highest[row]
    if sequence > top:
        return FRESH
    if top - sequence >= np.uint64(WINDOW):
        return TOO_OLD
    at = sequence % np.uint64(WINDOW)
    if (bits[row, at >> np.uint64(6)] >> (at & np.uint64(63))) & np.uint64(1):
        return DUPLICATE
    return FRESH


@njit(cache=True, nogil=True)
def window_mark(highest: NDArray[np.uint64], bits: NDArray[np.uint64], row: int, sequence: np.uint64) -> None:
    """Remembers ``sequence`` as applied; it must be FRESH."""
    top = highest[row]
    if sequence > top:
        if sequence - top >= np.uint64(WINDOW):
            bits[row, :] = np.uint64(0)
        else:
            gone = top + np.uint64(1)
            while gone <= sequence:  # the numbers skipped reuse ring places of long-gone ones
                at = gone % np.uint64(WINDOW)
                bits[row, at >> np.uint64(6)] &= ~(np.uint64(1) << (at & np.uint64(63)))
                gone += np.uint64(1)
        highest[row] = sequence
    at = sequence % np.uint64(WINDOW)
    bits[row, at >> np.uint64(6)] |= np.uint64(1) << (at & np.uint64(63))
