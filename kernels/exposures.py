"""Counts how often each row was shown."""

from __future__ import annotations

import numpy as np
from numba import njit
from numpy.typing import NDArray

from kernels.checks import require_array


def count_exposures(exposures: NDArray[np.uint32], slots: NDArray[np.int32]) -> None:
    """Adds one to ``exposures`` for each place of ``slots`` where a row is shown.

    Args:
        exposures: uint32[C], changed in place; wraps.
        slots: int32[B, L] of slates, below C; negative ones are padding.

    Raises:
        ValueError: an argument has the wrong dtype, shape or range; the message names it. Nothing was counted.

    Cost: reads each place twice.
    """
    _check(exposures, slots)
    if not _count(exposures, slots):
        raise ValueError(f"slots: must be below {len(exposures)}")


def count_exposures_reference(exposures: NDArray[np.uint32], slots: NDArray[np.int32]) -> None:
    """What :func:`count_exposures` does."""
    _check(exposures, slots)
    if (slots >= len(exposures)).any():
        raise ValueError(f"slots: must be below {len(exposures)}")
    np.add.at(exposures, slots[slots >= 0], np.uint32(1))


def _check(exposures: NDArray[np.uint32], slots: NDArray[np.int32]) -> None:
    require_array("exposures", exposures, np.uint32, (None,))
    require_array("slots", slots, np.int32, (None, None))


@njit(cache=True, nogil=True)
def _count(exposures: NDArray[np.uint32], slots: NDArray[np.int32]) -> bool:
    shown = slots.ravel()
    for slot in shown:
        if slot >= exposures.shape[0]:
            return False
    for slot in shown:
        if slot >= 0:
            exposures[slot] += np.uint32(1)
    return True
