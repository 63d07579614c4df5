"""Who may be shown: the one predicate of what searches may find and of the last check. Closed on doubt."""

from __future__ import annotations

from enum import IntEnum
from typing import NamedTuple

import numpy as np
from numba import njit
from numpy.typing import NDArray

from kernels.fence import FREE, LIVE


class Drop(IntEnum):
    """Why the last check removed a pick."""

    KEPT = 0
    NOT_LIVE = 1
    LEASE_EXPIRED = 2
    RULE = 3
    REGION = 4
    AGE_RATING = 5
    LANGUAGE = 6
    CATEGORY = 7
    NOT_NEEDED = 8  # reserve that no gap called for


class FilterColumns(NamedTuple):
    """V filters as columns. languages bool[V, L] and categories bool[V, G] say which interned numbers
    pass (numbers beyond L or G were interned later: they pass only where ``any_*`` is set)."""

    region: NDArray[np.int32]
    max_age_rating: NDArray[np.int32]
    any_language: NDArray[np.bool_]
    languages: NDArray[np.bool_]
    any_category: NDArray[np.bool_]
    categories: NDArray[np.bool_]


class RowColumns(NamedTuple):
    """The table's columns that decide whether a row may be shown, C rows."""

    state: NDArray[np.uint8]
    lease_expires_ms: NDArray[np.int64]
    rule_bits: NDArray[np.uint32]
    region: NDArray[np.int32]
    age_rating: NDArray[np.int32]
    language: NDArray[np.int32]
    category: NDArray[np.int32]


@njit(cache=True, nogil=True, inline="always")
def check_values(
    state: int,
    lease_expires_ms: int,
    rule_bits: np.uint32,
    region: int,
    age_rating: int,
    language: int,
    category: int,
    f_region: int,
    f_max_age_rating: int,
    f_any_language: bool,
    f_languages: NDArray[np.bool_],
    f_any_category: bool,
    f_categories: NDArray[np.bool_],
    exclude_bits: np.uint32,
    now_ms: int,
) -> int:
    """The one predicate: `Drop` code of a row with these values for a filter with these; 0: may be shown.

    Takes values, not columns: handing arrays to a function once per row costs more than the comparisons.
    """
    if state != LIVE:
        return 1
    if lease_expires_ms <= now_ms:
        return 2
    if rule_bits & exclude_bits:
        return 3
    if region != 0 and region != f_region:
        return 4
    if age_rating > f_max_age_rating:
        return 5
    if not f_any_language and not (language < f_languages.shape[0] and f_languages[language]):
        return 6
    if not f_any_category and not (category < f_categories.shape[0] and f_categories[category]):
        return 7
    return 0


@njit(cache=True, nogil=True)
def codes_of_rows(
    row: RowColumns,
    slots: NDArray[np.int32],
    f: FilterColumns,
    v: int,
    exclude_bits: np.uint32,
    now_ms: int,
) -> NDArray[np.uint8]:
    state, lease, bits = row.state, row.lease_expires_ms, row.rule_bits
    region, age, language, category = row.region, row.age_rating, row.language, row.category
    languages, categories = f.languages[v], f.categories[v]
    f_region, f_age = f.region[v], f.max_age_rating[v]
    any_language, any_category = f.any_language[v], f.any_category[v]
    out = np.empty(slots.shape[0], dtype=np.uint8)
    for i in range(slots.shape[0]):
        s = slots[i]
        out[i] = check_values(
            state[s], lease[s], bits[s], region[s], age[s], language[s], category[s], f_region, f_age,
            any_language, languages, any_category, categories, exclude_bits, now_ms,
        )  # fmt: skip
    return out


def check_rows(
    row: RowColumns,
    slots: NDArray[np.int32],
    filters: FilterColumns,
    v: int,
    exclude_bits: int,
    now_ms: int,
) -> NDArray[np.uint8]:
    """`Drop` codes uint8[n] of rows ``slots`` int32[n] for row ``v`` of ``filters``; 0: may be shown now.

    Raises ValueError when a slot is outside the table. Cost: one pass, about 30 bytes per row.
    """
    if len(slots) and not (int(slots.min()) >= 0 and int(slots.max()) < len(row.state)):
        raise ValueError(f"slots: 0 to {len(row.state) - 1} allowed")
    return np.asarray(codes_of_rows(row, slots, filters, v, np.uint32(exclude_bits), now_ms))


def eligible_rows(row: RowColumns, showable: NDArray[np.bool_], filters: FilterColumns, v: int) -> NDArray[np.bool_]:
    """bool[n]: which of the first n rows pass row ``v`` of ``filters``; ``showable`` bool[n] is the rest.

    What the search may find: the predicate of `check_rows` where ``showable`` says that a row is live, inside
    its lease and free of excluding rules. Whole columns at a time, because it runs over the whole table.
    Cost: 10 bytes per row, 8 more per name filter.
    """
    n = len(showable)
    region = row.region[:n]
    eligible = showable & ((region == 0) | (region == filters.region[v]))
    eligible &= row.age_rating[:n] <= filters.max_age_rating[v]
    for any_name, allowed, names in (
        (filters.any_language[v], filters.languages[v], row.language[:n]),
        (filters.any_category[v], filters.categories[v], row.category[:n]),
    ):
        if not any_name:
            # One place more for names that were interned after the filter was built: they do not match.
            eligible &= np.append(allowed, False)[np.minimum(names, len(allowed))]
    return np.asarray(eligible)


assert (FREE, LIVE, Drop.NOT_NEEDED) == (0, 1, 8)  # the numbers written out in the kernels
