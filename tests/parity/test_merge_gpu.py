"""The GPU's union of candidate lists against the CPU's: the same proposals, sources, order and counts."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from kernels.merge import merge_candidates as merge_on_cpu
from kernels.merge_gpu import merge_candidates
from tests.device import empty, get, put

PERSONAL, FOLLOWED = 1 << 0, 1 << 4
ROWS = 24


def on_device(
    lists: dict[str, NDArray[np.int32]], spare: int = 0, view_limit: int = 999, personal_limit: int = 999
) -> tuple[NDArray[np.int32], ...]:
    """slots, sources, counts, dropped."""
    batch = len(lists["filter_of"])
    width = sum(lists[name].shape[1] for name in ("view_slots", "personal", "followed")) + spare
    slots, sources = empty((batch, width), torch.int32), empty((batch, width), torch.int32)
    counts, dropped = empty((batch,), torch.int32), empty((batch,), torch.int32)
    on = {name: put(values) for name, values in lists.items()}
    merge_candidates(
        on["view_slots"], on["view_sources"], on["filter_of"], on["personal"], PERSONAL, on["followed"], FOLLOWED,
        on["excluded"], put(np.full(batch, view_limit, np.int32)),
        put(np.array([0, 0, 0, 0, 0, 0, personal_limit, 0], np.int64)),
        slots=slots, sources=sources, counts=counts, dropped=dropped,
    )  # fmt: skip
    return get(slots), get(sources), get(counts), get(dropped)


def on_cpu(lists: dict[str, NDArray[np.int32]]) -> tuple[NDArray[np.int32], ...]:
    slots, sources = [], []
    for b, v in enumerate(lists["filter_of"]):
        for values, bits in (
            (lists["view_slots"][v], lists["view_sources"][v]),
            (lists["personal"][b], np.full(lists["personal"].shape[1], PERSONAL)),
            (lists["followed"][b], np.full(lists["followed"].shape[1], FOLLOWED)),
        ):
            slots.append(values)
            sources.append(bits.astype(np.uint32))
    batch, excluded = len(lists["filter_of"]), lists["excluded"]
    flat = np.concatenate(slots)
    return merge_on_cpu(
        flat, np.concatenate(sources), np.arange(batch + 1) * (len(flat) // batch), excluded.ravel(),
        np.arange(batch + 1) * excluded.shape[1], ROWS,
    )  # fmt: skip


def assert_same(lists: dict[str, NDArray[np.int32]]) -> None:
    """Also that every distinct proposal was either kept or dropped."""
    slots, sources, counts, dropped = on_device(lists, spare=3)
    cpu_slots, cpu_sources, cpu_counts, cpu_dropped = on_cpu(lists)
    np.testing.assert_array_equal(counts, cpu_counts)
    np.testing.assert_array_equal(dropped, cpu_dropped)
    assert (sources[slots < 0] == 0).all()
    for b, count in enumerate(counts):
        kept = slots[b] >= 0
        np.testing.assert_array_equal(slots[b, kept], cpu_slots[b, :count])
        np.testing.assert_array_equal(sources[b, kept], cpu_sources[b, :count].astype(np.int32))
        v = lists["filter_of"][b]
        offered = np.concatenate([lists["view_slots"][v], lists["personal"][b], lists["followed"][b]])
        assert count + dropped[b] == len(np.unique(offered[offered >= 0]))


@st.composite
def problems(draw: st.DrawFn) -> dict[str, NDArray[np.int32]]:
    batch, filters = draw(st.integers(1, 3)), draw(st.integers(1, 2))
    cells = st.integers(-1, ROWS - 1)

    def block(rows: int, values: st.SearchStrategy[int], most: int = 12) -> NDArray[np.int32]:
        width = draw(st.integers(0, most))
        flat = draw(st.lists(values, min_size=rows * width, max_size=rows * width))
        return np.array(flat, np.int32).reshape(rows, width)

    width = draw(st.integers(0, ROWS))
    views = np.full((filters, width), -1, np.int32)
    for v in range(filters):
        found = draw(st.lists(st.integers(0, ROWS - 1), unique=True, max_size=width))
        views[v, : len(found)] = found
        views[v] = draw(st.permutations(views[v].tolist()))
    bits = draw(st.lists(st.integers(1, 63), min_size=views.size, max_size=views.size))
    return {
        "view_slots": views,
        "view_sources": np.array(bits, np.int32).reshape(views.shape),
        "filter_of": np.array(draw(st.lists(st.integers(0, filters - 1), min_size=batch, max_size=batch)), np.int32),
        "personal": block(batch, cells),
        "followed": block(batch, cells, most=5),
        "excluded": block(batch, cells, most=6),
    }


@settings(max_examples=30, deadline=None)
@given(problems())
def test_merge_on_the_device_equals_the_cpu_and_loses_nothing(lists: dict[str, NDArray[np.int32]]) -> None:
    assert_same(lists)


def test_lists_longer_than_a_block_are_merged_across_blocks() -> None:
    rng = np.random.default_rng(2)
    view = rng.permutation(200)[None, :100].astype(np.int32)
    lists = {
        "view_slots": np.where(view < ROWS, view, -1).astype(np.int32),
        "view_sources": rng.integers(1, 64, (1, 100), dtype=np.int32),
        "filter_of": np.zeros(1, np.int32),
        "personal": rng.integers(-1, ROWS, (1, 90), dtype=np.int32),
        "followed": rng.integers(-1, ROWS, (1, 30), dtype=np.int32),
        "excluded": rng.integers(-1, ROWS, (1, 7), dtype=np.int32),
    }
    assert_same(lists)


def test_under_pressure_only_the_first_of_a_view_and_of_the_personal_proposals_are_taken() -> None:
    rng = np.random.default_rng(3)
    lists = {
        "view_slots": rng.permutation(ROWS)[None, :12].astype(np.int32),
        "view_sources": rng.integers(1, 64, (1, 12), dtype=np.int32),
        "filter_of": np.zeros(1, np.int32),
        "personal": rng.integers(-1, ROWS, (1, 9), dtype=np.int32),
        "followed": rng.integers(-1, ROWS, (1, 5), dtype=np.int32),
        "excluded": rng.integers(-1, ROWS, (1, 3), dtype=np.int32),
    }
    found = on_device(lists, view_limit=5, personal_limit=4)
    fewer = {name: values[:, :{"personal": 4}.get(name, 5)] if values.ndim > 1 else values for name, values in
             lists.items()}  # fmt: skip
    cpu = on_cpu(fewer)
    assert (found[2].tolist(), found[3].tolist()) == (cpu[2].tolist(), cpu[3].tolist())
    kept = found[0][0] >= 0
    assert found[0][0][kept].tolist() == cpu[0][0].tolist() and found[1][0][kept].tolist() == cpu[1][0].tolist()


def test_an_output_that_is_too_narrow_and_a_bit_out_of_range_are_named() -> None:
    lists = {
        "view_slots": torch.zeros((1, 2), dtype=torch.int32), "view_sources": torch.zeros((1, 2), dtype=torch.int32),
        "filter_of": torch.zeros(1, dtype=torch.int32), "personal": torch.zeros((1, 2), dtype=torch.int32),
        "personal_bit": 1, "followed": torch.zeros((1, 1), dtype=torch.int32), "followed_bit": 16,
        "excluded": torch.zeros((1, 1), dtype=torch.int32), "view_limits": torch.zeros(1, dtype=torch.int32),
        "params": torch.zeros(8, dtype=torch.int64),
        "slots": torch.zeros((1, 4), dtype=torch.int32), "sources": torch.zeros((1, 4), dtype=torch.int32),
        "counts": torch.zeros(1, dtype=torch.int32), "dropped": torch.zeros(1, dtype=torch.int32),
    }  # fmt: skip
    with pytest.raises(ValueError, match=r"^slots: must be at least 5 wide"):
        merge_candidates(**lists)
    with pytest.raises(ValueError, match=r"^followed_bit: must be positive and below 1 << 27"):
        merge_candidates(**{**lists, "followed_bit": 1 << 27})
