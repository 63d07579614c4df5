"""Messages laid into a ring in one pass are those of the plain reference, and nothing else is touched."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kernels.rings import lay_messages, lay_messages_reference


@settings(deadline=None, max_examples=200)
@given(st.data())
def test_fast_and_reference_agree_at_any_place_and_fill(data: st.DataObject) -> None:
    capacity = 8 * data.draw(st.integers(1, 30))
    done = 8 * data.draw(st.integers(0, 100))
    at = done + 8 * data.draw(st.integers(0, capacity // 8))
    rng = np.random.default_rng(data.draw(st.integers(0, 9)))
    n, width, rows = data.draw(st.integers(0, 5)), data.draw(st.integers(0, 20)), data.draw(st.integers(1, 4))
    lengths = rng.integers(0, 40, rows)
    offsets = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)
    columns = (
        rng.integers(0, 256, (n, width)).astype(np.uint8),
        rng.integers(0, 256, data.draw(st.integers(0, 10))).astype(np.uint8),
        rng.integers(0, 256, offsets[-1]).astype(np.uint8),
        offsets,
        rng.integers(0, rows, n),
    )
    before = rng.integers(0, 256, capacity).astype(np.uint8)
    fast, slow = before.copy(), before.copy()
    assert lay_messages(fast, at, done, *columns) == lay_messages_reference(slow, at, done, *columns)
    np.testing.assert_array_equal(fast, slow)


@pytest.mark.parametrize(
    ("changed", "name"),
    [
        ({"ring": np.zeros(12, np.uint8)}, "ring"),
        ({"at": 4}, "at, done"),
        ({"at": 72}, "at, done"),
        ({"done": 8}, "at, done"),
        ({"which": np.array([2])}, "which"),
        ({"which": np.array([-1])}, "which"),
        ({"offsets": np.array([0, 2, 5])}, "offsets"),
        ({"offsets": np.array([0, 3, 2])}, "offsets"),
        ({"heads": np.zeros((1, 2), np.int64)}, "heads"),
    ],
)
def test_wrong_arguments_are_named_and_write_nothing(changed: dict[str, object], name: str) -> None:
    right: dict[str, object] = {
        "ring": np.zeros(64, np.uint8),
        "at": 0,
        "done": 0,
        "heads": np.ones((1, 2), np.uint8),
        "common": np.ones(1, np.uint8),
        "rows": np.ones(4, np.uint8),
        "offsets": np.array([0, 2, 4]),
        "which": np.array([1]),
    }
    arguments = right | changed
    with pytest.raises(ValueError, match=name):
        lay_messages(**arguments)  # type: ignore[arg-type]
    assert not np.any(arguments["ring"])
