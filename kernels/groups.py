"""First few of each group in a given order: trending per category, per language."""

from __future__ import annotations

import numpy as np
from numba import njit
from numpy.typing import NDArray


@njit(cache=True, nogil=True)
def _first_per_group(
    order: NDArray[np.int32],
    eligible: NDArray[np.bool_],
    group: NDArray[np.int32],
    per_group: int,
    counts: NDArray[np.int64],
) -> NDArray[np.int32]:
    out = np.empty(order.shape[0], dtype=np.int32)
    n = 0
    for s in order:
        if s < eligible.shape[0] and eligible[s]:
            g = group[s]
            if g > 0 and counts[g] < per_group:
                counts[g] += 1
                out[n] = s
                n += 1
    return out[:n].copy()


def first_per_group(
    order: NDArray[np.int32],
    eligible: NDArray[np.bool_],
    group: NDArray[np.int32],
    per_group: int,
    n_groups: int,
) -> NDArray[np.int32]:
    """The first ``per_group`` eligible slots of every group, in the order given.

    Args:
        order: int32[n], slots. eligible: bool[N] by slot; slots from N on are not eligible.
        group: int32[C] by slot, 0 (no group) to n_groups - 1; group 0 is left out.

    Returns:
        int32[m]. Raises ValueError when a group is out of range. Cost: one pass, 5 bytes per slot.
    """
    if len(order) and int(order.max()) >= len(group):
        raise ValueError(f"order: below {len(group)} allowed, got {int(order.max())}")
    if len(group) and not (int(group.min()) >= 0 and int(group.max()) < n_groups):
        raise ValueError(f"group: 0 to {n_groups - 1} allowed")
    return np.asarray(_first_per_group(order, eligible, group, per_group, np.zeros(n_groups, np.int64)))


def first_per_group_reference(
    order: NDArray[np.int32],
    eligible: NDArray[np.bool_],
    group: NDArray[np.int32],
    per_group: int,
    n_groups: int,
) -> NDArray[np.int32]:
    """Plain version of `first_per_group`."""
    counts = [0] * n_groups
    out = []
    for s in order.tolist():
        if s < len(eligible) and eligible[s] and group[s] > 0 and counts[group[s]] < per_group:
            counts[group[s]] += 1
            out.append(s)
    return np.array(out, np.int32)
