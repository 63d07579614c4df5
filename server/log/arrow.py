"""NumPy to Arrow and back by their buffers.

pyarrow's own conversions import pandas when they are first used: 0.3 s with the interpreter's lock held and 50 MiB, in
the middle of serving (docs/lab.md, "The first snapshot").
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray


def array_of(column: NDArray[Any]) -> pa.Array:
    """A contiguous column of numbers of any number of dimensions, without a copy; rows become fixed-size lists.

    Raises TypeError for a column that is not of numbers.
    """
    if column.dtype.kind not in "iuf":
        raise TypeError(f"column: integers or floats wanted, got {column.dtype}")
    flat = column.reshape(-1)
    values = pa.Array.from_buffers(pa.from_numpy_dtype(column.dtype), len(flat), [None, pa.py_buffer(flat)])
    return values if column.ndim == 1 else pa.FixedSizeListArray.from_arrays(values, int(np.prod(column.shape[1:])))


def strings_of(texts: Sequence[str]) -> pa.StringArray:
    """One string per row, at most 2 GiB of UTF-8 in all."""
    encoded = [text.encode() for text in texts]
    return pa.StringArray.from_buffers(len(encoded), _offsets(map(len, encoded)), pa.py_buffer(b"".join(encoded)))


def string_lists_of(lists: Sequence[Sequence[str]]) -> pa.ListArray:
    """A list of strings per row."""
    offsets = pa.Array.from_buffers(pa.int32(), len(lists) + 1, [None, _offsets(map(len, lists))])
    return pa.ListArray.from_arrays(offsets, strings_of([text for texts in lists for text in texts]))


def numpy_of(column: pa.ChunkedArray) -> NDArray[Any]:
    """One array of a column's chunks; fixed-size lists become rows of one dimension more.

    A single chunk is not copied. The column was validated in full.

    Raises:
        ValueError: it is not of numbers, or one is missing.
    """
    kind = column.type
    width = kind.list_size if pa.types.is_fixed_size_list(kind) else None
    numbers = kind.value_type if width is not None else kind
    if not (pa.types.is_integer(numbers) or pa.types.is_floating(numbers)):
        raise ValueError(f"numbers wanted, got {kind}")
    parts = []
    for chunk in column.chunks:
        values = chunk.flatten() if width is not None else chunk
        if chunk.null_count or values.null_count:
            raise ValueError("a number is missing")
        data = values.buffers()[1]
        part = np.zeros(0, numbers.to_pandas_dtype())
        if len(values):
            part = np.frombuffer(data, part.dtype, len(values), values.offset * part.itemsize)
        parts.append(part if width is None else part.reshape(len(chunk), width))
    return parts[0] if len(parts) == 1 else np.concatenate(parts)


def _offsets(lengths: Any) -> pa.Buffer:
    return pa.py_buffer(np.fromiter(accumulate(lengths, initial=0), np.int32))
