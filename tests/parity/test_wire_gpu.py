"""The GPU's wire bytes are those of the CPU's encoder."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings

from kernels.idmap import id_words
from kernels.wire import encode_streams as encode_on_cpu
from kernels.wire_gpu import ENTRY_BYTES, encode_streams
from tests.device import empty, get, put
from tests.parity.test_slate import as_ids
from tests.parity.test_wire import replies

UNTOUCHED = 77  # what tests.device fills output buffers with


def assert_same_bytes(reply: dict[str, Any]) -> None:
    batch, width = reply["slots"].shape
    buffer, lengths = empty((batch, width * ENTRY_BYTES), torch.uint8), empty((batch,), torch.int32)
    encode_streams(
        *[put(reply[name]) for name in ("slots", "counts", "scores", "epochs", "verify_by_ms", "sources")],
        put(reply["exploration"]), put(id_words(reply["ids"])), put(reply["id_lengths"]),
        buffer=buffer, lengths=lengths,
    )  # fmt: skip
    expected, offsets = encode_on_cpu(**reply)
    np.testing.assert_array_equal(get(lengths), np.diff(offsets))
    for b, row in enumerate(get(buffer)):
        wire = expected[offsets[b] : offsets[b + 1]]
        assert row[: len(wire)].tobytes() == wire.tobytes()
        assert (row[len(wire) :] == UNTOUCHED).all(), "bytes behind the reply were written"


@settings(max_examples=40, deadline=None)
@given(replies())
def test_replies_have_the_bytes_of_the_cpu(reply: dict[str, Any]) -> None:
    assert_same_bytes(reply)


@pytest.mark.parametrize("width", [16, 37])
def test_replies_of_several_blocks_and_ids_of_every_length(width: int) -> None:
    rng = np.random.default_rng(width)
    rows = 65
    names = [rng.integers(1, 256, length, dtype=np.uint8).tobytes() for length in range(rows)]
    assert_same_bytes(
        {
            "slots": rng.integers(0, rows, (3, width), dtype=np.int32),
            "counts": np.array([width, width // 2, 0], np.int32),
            "scores": rng.standard_normal((3, width)).astype(np.float32),
            "epochs": rng.integers(0, 2**63 - 1, rows, dtype=np.int64),
            "verify_by_ms": rng.integers(-(2**63), 2**63 - 1, rows, dtype=np.int64),
            "sources": rng.integers(0, 2**32 - 1, (3, width), dtype=np.uint32),
            "exploration": rng.random((3, width)).astype(np.float32),
            "ids": as_ids(names),
            "id_lengths": np.arange(rows, dtype=np.uint8),
        }
    )


def test_a_buffer_that_could_overflow_is_refused() -> None:
    cells, column = torch.zeros((1, 2), dtype=torch.int32), torch.zeros(1, dtype=torch.int64)
    with pytest.raises(ValueError, match=r"^buffer: a stride of at least 202 bytes"):
        encode_streams(
            cells, cells[0, :1], cells.float(), column, column, cells, cells.float(),
            torch.zeros((1, 8), dtype=torch.int64), torch.zeros(1, dtype=torch.uint8),
            buffer=torch.zeros((1, 201), dtype=torch.uint8), lengths=cells[0, 1:],
        )  # fmt: skip
