"""Slots in an order, by group: trending per category and language, the streams of a creator."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numba import njit
from numpy.typing import NDArray

from kernels.checks import require_array


class Grouped(NamedTuple):
    """Slots by group: those of group g are ``members[starts[g] : starts[g + 1]]``, in the order given.

    order int32[n], as given. members int32[n], and places int32[n], where in the order they stand; starts
    int64[groups + 1].
    """

    order: NDArray[np.int32]
    members: NDArray[np.int32]
    places: NDArray[np.int32]
    starts: NDArray[np.int64]


def by_group(order: NDArray[np.int32], group: NDArray[np.int32], n_groups: int) -> Grouped:
    """Sorts slots by group, once for many questions.

    Args:
        order: int32[n], slots. group: int32[C] by slot, 0 to n_groups - 1.

    Raises:
        ValueError: an argument has the wrong dtype or shape, or a slot or its group is out of range.

    Cost: two passes, 16 bytes per slot.
    """
    require_array("order", order, np.int32, (None,))
    require_array("group", group, np.int32, (None,))
    if len(order) and not (int(order.min()) >= 0 and int(order.max()) < len(group)):
        raise ValueError(f"order: 0 to {len(group) - 1} allowed")
    members, places = np.empty(len(order), np.int32), np.empty(len(order), np.int32)
    starts = np.zeros(n_groups + 1, np.int64)
    if not _by_group(order, group, members, places, starts):
        raise ValueError(f"group: 0 to {n_groups - 1} allowed")
    return Grouped(order, members, places, starts)


def first_of_groups(grouped: Grouped, eligible: NDArray[np.bool_], per_group: int) -> NDArray[np.int32]:
    """The first ``per_group`` eligible slots of every group, int32[m], in the order given.

    Args:
        eligible: bool[N] by slot; slots from N on are not eligible.

    Group 0 (no group) is left out. Cost: a group is read until it has given enough.
    """
    require_array("eligible", eligible, np.bool_, (None,))
    places = _first_of_groups(grouped, eligible, per_group)
    places.sort()
    found: NDArray[np.int32] = grouped.order[places]
    return found


def first_eligible(order: NDArray[np.int32], eligible: NDArray[np.bool_], most: int) -> NDArray[np.int32]:
    """The first ``most`` eligible slots of ``order`` int32[n]; eligible: bool[N], slots from N on are not."""
    require_array("order", order, np.int32, (None,))
    require_array("eligible", eligible, np.bool_, (None,))
    return np.asarray(_first_eligible(order, eligible, most))


def eligible_members(
    grouped: Grouped,
    wanted: NDArray[np.int32],
    offsets: NDArray[np.int64],
    eligible: NDArray[np.bool_],
    mask_of: NDArray[np.int32],
    most: int,
) -> tuple[NDArray[np.int32], NDArray[np.int64]]:
    """The eligible slots of each query's groups, group by group as wanted, at most ``most`` of a query.

    Args:
        wanted: int32[Y] groups, query b's are offsets[b] to offsets[b + 1]; int64[B + 1]. One beyond those that
            ``grouped`` knows has no slots.
        eligible: bool[M, N]; query b uses row mask_of[b], int32[B].

    Returns:
        slots int32[T] and int64[B + 1] offsets into them.

    Raises:
        ValueError: an argument has the wrong dtype or shape, or offsets or masks do not fit.
    """
    require_array("wanted", wanted, np.int32, (None,))
    require_array("eligible", eligible, np.bool_, (None, None))
    require_array("mask_of", mask_of, np.int32, (None,))
    require_array("offsets", offsets, np.int64, (len(mask_of) + 1,))
    if int(offsets[-1]) != len(wanted):
        raise ValueError("offsets: must end at the number of wanted groups")
    if len(mask_of) and not (int(mask_of.min()) >= 0 and int(mask_of.max()) < len(eligible)):
        raise ValueError(f"mask_of: must lie in [0, {len(eligible)})")
    slots, found = _eligible_members(grouped, wanted, offsets, eligible, mask_of, most)
    return slots, found


@njit(cache=True, nogil=True)
def _by_group(
    order: NDArray[np.int32],
    group: NDArray[np.int32],
    members: NDArray[np.int32],
    places: NDArray[np.int32],
    starts: NDArray[np.int64],
) -> bool:
    n_groups = starts.shape[0] - 1
    for slot in order:
        g = group[slot]
        if not 0 <= g < n_groups:
            return False
        starts[g + 1] += 1
    for g in range(n_groups):
        starts[g + 1] += starts[g]
    free = starts[:-1].copy()
    for place in range(order.shape[0]):
        g = group[order[place]]
        members[free[g]] = order[place]
        places[free[g]] = place
        free[g] += 1
    return True


@njit(cache=True, nogil=True)
def _first_of_groups(grouped: Grouped, eligible: NDArray[np.bool_], per_group: int) -> NDArray[np.int32]:
    members, places, starts = grouped.members, grouped.places, grouped.starts
    n_groups = starts.shape[0] - 1
    out = np.empty(min(members.shape[0], max(0, n_groups - 1) * per_group), np.int32)
    n = 0
    for g in range(1, n_groups):
        full = n + per_group
        for i in range(starts[g], starts[g + 1]):
            if n == full:
                break
            slot = members[i]
            if slot < eligible.shape[0] and eligible[slot]:
                out[n] = places[i]
                n += 1
    return out[:n]


@njit(cache=True, nogil=True)
def _first_eligible(order: NDArray[np.int32], eligible: NDArray[np.bool_], most: int) -> NDArray[np.int32]:
    out = np.empty(min(order.shape[0], most), np.int32)
    n = 0
    for slot in order:
        if n == most:
            break
        if slot < eligible.shape[0] and eligible[slot]:
            out[n] = slot
            n += 1
    return out[:n].copy()


@njit(cache=True, nogil=True)
def _eligible_members(
    grouped: Grouped,
    wanted: NDArray[np.int32],
    offsets: NDArray[np.int64],
    eligible: NDArray[np.bool_],
    mask_of: NDArray[np.int32],
    most: int,
) -> tuple[NDArray[np.int32], NDArray[np.int64]]:
    members, starts = grouped.members, grouped.starts
    n_groups = starts.shape[0] - 1
    room = 0
    for g in wanted:
        if 0 <= g < n_groups:
            room += starts[g + 1] - starts[g]
    out = np.empty(room, np.int32)
    ends = np.zeros(offsets.shape[0], np.int64)
    n = 0
    for b in range(mask_of.shape[0]):
        full = n + most
        for w in range(offsets[b], offsets[b + 1]):
            g = wanted[w]
            if not 0 <= g < n_groups:
                continue
            for i in range(starts[g], starts[g + 1]):
                if n == full:
                    break
                slot = members[i]
                if slot < eligible.shape[1] and eligible[mask_of[b], slot]:
                    out[n] = slot
                    n += 1
        ends[b + 1] = n
    return out[:n].copy(), ends


def first_of_groups_reference(
    order: NDArray[np.int32],
    group: NDArray[np.int32],
    eligible: NDArray[np.bool_],
    per_group: int,
) -> NDArray[np.int32]:
    """Plain version of `by_group` and `first_of_groups`."""
    counts: dict[int, int] = {0: per_group}
    out = []
    for s in order.tolist():
        g = int(group[s])
        if s < len(eligible) and eligible[s] and counts.get(g, 0) < per_group:
            counts[g] = counts.get(g, 0) + 1
            out.append(s)
    return np.array(out, np.int32)


def eligible_members_reference(
    order: NDArray[np.int32],
    group: NDArray[np.int32],
    wanted: list[list[int]],
    eligible: NDArray[np.bool_],
    mask_of: NDArray[np.int32],
    most: int,
) -> list[list[int]]:
    """Plain version of `by_group` and `eligible_members`: a list of slots per query."""
    rows = []
    for groups, v in zip(wanted, mask_of, strict=True):
        members = [s for g in groups for s in order.tolist() if group[s] == g]
        rows.append([s for s in members if s < eligible.shape[1] and eligible[v, s]][:most])
    return rows
