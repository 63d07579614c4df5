"""The total order of a table by score."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray


def rank_rows(
    scores: NDArray[np.float32], slots: NDArray[np.int32], ids: NDArray[np.bytes_] | None
) -> NDArray[np.int32]:
    """Slots by score descending, non-finite last, ties by id ascending (without ids: by slot).

    One unstable argsort, then only the rows of tied runs are sorted by id: comparing strings costs far more
    than comparing floats, and ties are few unless the model is constant.

    Args:
        scores: float32[n]. slots: int32[n]. ids: 'S64'[n] or None. None is changed.

    Returns:
        int32[n], a permutation of ``slots``.
    """
    # All non-finite rows become one value below every finite score, so that they tie with each other.
    key = np.where(np.isfinite(scores), -scores, np.float32(np.inf))
    order: NDArray[np.intp] = np.argsort(key)
    ranked = key[order]
    same = ranked[1:] == ranked[:-1]
    if same.any():
        in_run = np.zeros(len(key), dtype=bool)
        in_run[1:] |= same
        in_run[:-1] |= same
        places = np.flatnonzero(in_run)
        rows = order[places]
        order[places] = rows[_by_id(ranked[places], rows, slots, ids)]
    result: NDArray[np.int32] = slots[order]
    return result


def _by_id(
    keys: NDArray[np.float32],
    rows: NDArray[np.intp],
    slots: NDArray[np.int32],
    ids: NDArray[np.bytes_] | None,
) -> NDArray[np.intp]:
    """Order of tied ``rows``: by key (equal within a run, ascending across runs), then by id."""
    names: tuple[NDArray[Any], ...] = (slots[rows],) if ids is None else (slots[rows], ids[rows])
    return np.lexsort((*names, keys))
