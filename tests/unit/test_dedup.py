"""No event counts twice, whatever order its copies arrive in."""

from __future__ import annotations

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from kernels.dedup import DUPLICATE, FRESH, TOO_OLD, WINDOW, WORDS, window_check, window_mark


def accept(sequences: list[int]) -> list[int]:
    highest, bits = np.zeros(1, np.uint64), np.zeros((1, WORDS), np.uint64)
    verdicts = []
    for sequence in sequences:
        verdicts.append(window_check(highest, bits, 0, np.uint64(sequence)))
        if verdicts[-1] == FRESH:
            window_mark(highest, bits, 0, np.uint64(sequence))
    return verdicts


@settings(max_examples=200, deadline=None)
@given(
    st.lists(
        st.one_of(st.integers(1, 40), st.integers(WINDOW - 5, WINDOW + 45), st.integers(3 * WINDOW, 3 * WINDOW + 40)),
        max_size=60,
    )
)
def test_equals_a_set_of_everything_seen_inside_the_window(sequences: list[int]) -> None:
    seen: set[int] = set()
    for sequence, verdict in zip(sequences, accept(sequences), strict=True):
        top = max(seen, default=0)
        expected = TOO_OLD if top - sequence >= WINDOW else DUPLICATE if sequence in seen else FRESH
        assert verdict == expected
        if expected == FRESH:
            seen.add(sequence)


def test_a_gap_does_not_resurrect_ring_places() -> None:
    """Sequence 5 and 5 + WINDOW share a bit: skipping past one must clear it for the other."""
    assert accept([5, 4 + WINDOW, 5 + WINDOW]) == [FRESH, FRESH, FRESH]
    assert accept([5, 6 + WINDOW, 5 + WINDOW]) == [FRESH, FRESH, FRESH]
