"""A sweep goes over every live row once, in steps that are smaller while there is less time."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from server import sweep as module
from server.sweep import Sweep


class Streams:
    """Tells which rows were assessed, step by step."""

    def __init__(self, rows: int) -> None:
        self.session, self.steps = np.zeros(rows, np.uint32), list[list[int]]()

    def assess(self, slots: Any, now_ms: int) -> Any:
        self.steps.append(slots.tolist())
        return SimpleNamespace(values=np.zeros((len(slots), 2), np.float32), states=np.zeros((len(slots), 2), np.uint8))


def swept(rows: int, shares: list[float]) -> list[list[int]]:
    """The rows of each step; the last share holds on."""
    streams, sweep = Streams(rows), Sweep(np.arange(rows, dtype=np.int32), ("a", "b"))  # type: ignore[arg-type]
    for i in range(1_000):
        sweep.step(streams, 0, shares[min(i, len(shares) - 1)])  # type: ignore[arg-type]
        if sweep.finished:
            return streams.steps
    raise AssertionError("it does not end")


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "CHUNK_ROWS", 40)


@pytest.mark.parametrize("shares", [[1.0], [0.25], [1.0, 0.25, 0.6], [0.001]])
def test_every_row_is_assessed_once_in_order_whatever_share_of_a_chunk_a_step_takes(shares: list[float]) -> None:
    assert [row for step in swept(103, shares) for row in step] == list(range(103))


def test_a_step_takes_its_share_of_a_chunk() -> None:
    assert [len(step) for step in swept(100, [1.0, 0.25])] == [40, 10, 10, 10, 10, 10, 10]


def test_however_small_the_share_the_table_is_done_within_a_bounded_number_of_steps() -> None:
    assert len(swept(1_000, [0.001])) == module.MOST_STEPS
    assert len(swept(8_000, [0.001])) == 8_000 / 40, "but no step is larger than a chunk"


def test_an_empty_table_is_done_at_once() -> None:
    assert swept(0, [0.25]) == []
