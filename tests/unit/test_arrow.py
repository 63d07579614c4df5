"""NumPy to Arrow and back by buffers: what pyarrow itself makes of the same values, and never an import of pandas."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from server.log.arrow import array_of, numpy_of, string_lists_of, strings_of

DTYPES = st.sampled_from([np.uint8, np.uint16, np.int32, np.uint32, np.int64, np.uint64, np.float16, np.float32])
TEXTS = st.lists(st.text(max_size=9), max_size=12)


@given(st.data(), DTYPES, st.integers(0, 7), st.one_of(st.none(), st.integers(1, 5)))
def test_numbers_come_back_bit_for_bit(data: st.DataObject, dtype: type, rows: int, width: int | None) -> None:
    shape = (rows,) if width is None else (rows, width)
    column = data.draw(arrays.arrays(dtype, shape))
    made = array_of(column)
    assert len(made) == rows
    made.validate(full=True)
    back = numpy_of(pa.chunked_array([made]))
    assert (back.dtype, back.shape) == (column.dtype, column.shape)
    assert back.tobytes() == column.tobytes()
    parts = pa.chunked_array([made.slice(0, rows // 2), made.slice(rows // 2)])
    assert numpy_of(parts).tobytes() == column.tobytes()


@given(TEXTS)
def test_strings_are_those_that_pyarrow_makes(texts: list[str]) -> None:
    made = strings_of(texts)
    made.validate(full=True)
    assert made.equals(pa.array(texts, pa.string()))


@given(st.lists(TEXTS, max_size=6))
def test_lists_of_strings_are_those_that_pyarrow_makes(lists: list[list[str]]) -> None:
    made = string_lists_of(lists)
    made.validate(full=True)
    assert made.equals(pa.array(lists, pa.list_(pa.string())))


@pytest.mark.parametrize("column", [np.zeros(2, np.bool_), np.array(["a"]), np.array([None])])
def test_a_column_that_is_not_of_numbers_is_refused(column: np.ndarray) -> None:  # type: ignore[type-arg]
    with pytest.raises(TypeError, match="integers or floats wanted"):
        array_of(column)


@pytest.mark.parametrize(
    "column",
    [
        pa.array([1, None]), pa.array([[1.0, None]], pa.list_(pa.float32(), 2)), pa.array(["a"]), pa.array([True]),
        pa.array([None, [1, 2]], pa.list_(pa.int32(), 2)), pa.array([], pa.list_(pa.string(), 2)),
    ],
)  # fmt: skip
def test_what_holds_no_numbers_or_lacks_one_is_refused(column: pa.Array) -> None:
    with pytest.raises(ValueError, match="number"):
        numpy_of(pa.chunked_array([column]))


def test_snapshots_are_written_and_read_without_pandas(tmp_path: Path) -> None:
    """It would be imported in the middle of serving, with the interpreter's lock held."""
    script = f"""
import sys
from pathlib import Path
from server.log.snapshot import Contents, SnapshotFolder, manifest_of, read
from server.live.state import StateBuffer
from server.live.table import End
from tests.events import T0, apply, new_table, small_settings, started

table = new_table(small_settings())
apply(table, started("s", 1, T0, tags=["a", "b"], title="t"))
state = StateBuffer().capture(table)
told = dict(stamp_ms=1, record_crc=0, table_ms=1, log="sqlite", feature_schema="", ends_newest=1)
contents = Contents(manifest_of(state, offset=1, **told), state, [End("gone", 1, 2, "why")])
found = read(SnapshotFolder(Path({str(tmp_path)!r})).write(contents))
assert found.state.tags == [("a", "b")] and found.ends == contents.ends
assert "pandas" not in sys.modules
"""
    root = Path(__file__).parents[2]
    done = subprocess.run([sys.executable, "-c", script], cwd=root, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
