"""Whether bytes are UTF-8, where only compiled code gets to see them."""

from __future__ import annotations

import numpy as np
from numba import njit
from numpy.typing import NDArray


@njit(cache=True, nogil=True, forceinline=True)
def is_ascii(data: NDArray[np.uint8], at: int, end: int) -> bool:
    """Whether every byte of ``data[at:end]`` is below 128."""
    seen = np.uint8(0)
    for i in range(at, end):
        seen |= data[i]
    return bool(seen < 128)


@njit(cache=True, nogil=True)
def valid_utf8(data: NDArray[np.uint8], at: int, end: int) -> bool:
    """Whether ``data[at:end]`` is UTF-8 (RFC 3629: no surrogates, nothing overlong, at most U+10FFFF).

    data: uint8[m]; the caller answers for 0 <= at <= end <= m. Cost: one pass.
    """
    if is_ascii(data, at, end):
        return True
    while at < end:
        first = data[at]
        if first < 0x80:
            at += 1
            continue
        if 0xC2 <= first <= 0xDF:
            more, low, high = 1, 0x80, 0xBF
        elif 0xE0 <= first <= 0xEF:
            more = 2
            low = 0xA0 if first == 0xE0 else 0x80
            high = 0x9F if first == 0xED else 0xBF
        elif 0xF0 <= first <= 0xF4:
            more = 3
            low = 0x90 if first == 0xF0 else 0x80
            high = 0x8F if first == 0xF4 else 0xBF
        else:
            return False
        if at + more >= end or not low <= data[at + 1] <= high:
            return False
        for i in range(at + 2, at + more + 1):
            if not 0x80 <= data[i] <= 0xBF:
                return False
        at += more + 1
    return True


def valid_utf8_reference(data: NDArray[np.uint8], at: int, end: int) -> bool:
    """Plain version of `valid_utf8`."""
    try:
        data[at:end].tobytes().decode()
    except UnicodeDecodeError:
        return False
    return True
