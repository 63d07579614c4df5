"""The GPU's masked top-k gives the CPU's ids and scores bit for bit, or says that it cannot prove them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from kernels import scan_gpu
from kernels.canonical_gpu import decide, masked_topk_slow
from kernels.topk import canonical_inner_reference, masked_topk, masked_topk_reference
from kernels.topk_gpu import TopkBuffers, put_rows
from kernels.topk_gpu import masked_topk as masked_topk_gpu
from tests.device import DEVICE, empty, get, put

Arrays = tuple[NDArray[np.int32], NDArray[np.float32]]


class Search:
    """A table and queries on both sides."""

    def __init__(self, seed: int, batch: int, rows: int, dim: int, masks: int, share: float) -> None:
        self.rng = rng = np.random.default_rng(seed)
        self.queries = rng.standard_normal((batch, dim)).astype(np.float32)
        self.table = rng.standard_normal((rows, dim)).astype(np.float32)
        self.eligible = rng.random((masks, rows)) < share
        self.mask_of = rng.integers(0, masks, batch).astype(np.int32)
        self.in_use, self.batch_in_use, self.masks_in_use = rows, batch, 0

    def on_device(self, k: int, capacity: int = 0, sample_rows: int = 128) -> tuple[Arrays, NDArray[np.uint8]]:
        batch, (rows, dim) = len(self.queries), self.table.shape
        table, table16 = empty((rows, dim), torch.float32), empty((rows, dim), torch.float16)
        longest = put(np.zeros(1, np.float32))
        put_rows(put(np.arange(rows, dtype=np.int32)), put(self.table), table=table, table16=table16, longest=longest)
        work = TopkBuffers.allocate(
            batch, k, rows, dim, len(self.eligible), DEVICE, capacity=capacity, sample_rows=sample_rows
        )
        slots, scores = empty((batch, k), torch.int32), empty((batch, k), torch.float32)
        unproven = empty((batch,), torch.uint8)
        params = np.array([0, self.in_use, self.batch_in_use, 0, 0, 0, 0, self.masks_in_use])
        masked_topk_gpu(
            put(self.queries), table, table16, longest, put(self.eligible), put(self.mask_of), k, put(params),
            work=work, slots=slots, scores=scores, unproven=unproven,
        )  # fmt: skip
        self.work = work
        return (get(slots), get(scores)), get(unproven)

    def decide_again(
        self, candidates: NDArray[np.int32], k: int, floor: float = -np.inf, error: float = 0.0
    ) -> tuple[Arrays, NDArray[np.uint8]]:
        """The deciding half alone, for one query and given candidates."""
        work, offered = self.work, np.zeros((1, self.work.candidates.shape[1]), np.int32)
        offered[0, : candidates.size] = candidates
        slots, scores, unproven = empty((1, k), torch.int32), empty((1, k), torch.float32), empty((1,), torch.uint8)
        decide(
            put(self.queries), put(self.table), put(offered), put(np.array([candidates.size], np.int32)),
            put(np.zeros(1, np.int32)), put(np.array([floor], np.float32)), put(np.array([error])), work.scales, k,
            keys=work.keys, best=work.best, n_best=work.n_best, slots=slots, scores=scores, unproven=unproven,
        )  # fmt: skip
        return (get(slots), get(scores)), get(unproven)

    def slowly(self, k: int) -> Arrays:
        batch = len(self.queries)
        slots, scores = empty((batch, k), torch.int32), empty((batch, k), torch.float32)
        masked_topk_slow(
            put(self.queries), put(self.table), put(self.eligible), put(self.mask_of), k, self.in_use,
            slots=slots, scores=scores,
        )  # fmt: skip
        return get(slots), get(scores)

    def expected(self, k: int, fast: bool = False) -> Arrays:
        n = self.in_use
        arguments = (self.queries, self.table[:n].copy(), self.eligible[:, :n].copy(), self.mask_of, k)
        return masked_topk(*arguments) if fast else masked_topk_reference(*arguments)


def assert_same(found: Arrays, expected: Arrays) -> None:
    np.testing.assert_array_equal(found[0], expected[0])
    np.testing.assert_array_equal(found[1], expected[1])


def assert_proven_and_exact(search: Search, k: int, **buffers: Any) -> None:
    found, unproven = search.on_device(k, **buffers)
    assert not unproven.any()
    assert_same(found, search.expected(k))
    fast = search.expected(k, fast=True)
    np.testing.assert_array_equal(found[0], fast[0])
    np.testing.assert_array_equal(found[1].view(np.uint32), fast[1].view(np.uint32))  # the sign of 0, too


@pytest.mark.parametrize(
    "shape",  # batch, rows, dim, masks, share eligible, k
    [
        (1, 1, 1, 1, 1.0, 1),
        (3, 70, 8, 2, 0.5, 7),
        (5, 333, 13, 3, 0.6, 40),
        (2, 300, 64, 1, 1.0, 300),  # the whole table
        (2, 97, 24, 1, 0.3, 90),  # k exceeds the eligible rows
        (1, 40, 16, 1, 0.9, 100),  # k exceeds the rows
        (4, 50, 8, 2, 0.0, 5),  # nothing eligible
        (17, 60, 64, 4, 0.8, 10),  # a tile of 32 queries, not full
        (2, 300, 100, 1, 0.8, 9),  # wider than one step of the tensor cores
    ],
)
def test_ids_and_scores_are_those_of_the_cpu_bit_for_bit(shape: tuple[Any, ...]) -> None:
    assert_proven_and_exact(Search(3, *shape[:-1]), shape[-1])


def test_a_table_larger_than_the_buffers_is_searched_by_a_sampled_floor() -> None:
    search = Search(5, 3, 3_000, 16, 2, 0.7)
    assert_proven_and_exact(search, 20, capacity=512, sample_rows=512)
    assert np.isfinite(get(search.work.floors)).all()
    assert (get(search.work.n_candidates) < 512).all()


def test_more_queries_than_a_tile_and_several_row_tiles_per_program(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(scan_gpu.SCAN_SHAPES, 32, scan_gpu.ScanShape(16, 64, 4, 1))
    monkeypatch.setattr(scan_gpu, "_PROGRAMS", 2)  # so that a program takes more than one
    assert_proven_and_exact(Search(6, 18, 300, 12, 2, 0.8), 5)


def test_masks_in_use_are_enough_and_those_behind_them_are_not_packed() -> None:
    search = Search(8, 3, 90, 16, 5, 0.5)
    search.mask_of[:] = [0, 1, 1]
    search.masks_in_use = 2
    assert_proven_and_exact(search, 7)
    packed = get(search.work.bits)
    search.work.bits.fill_(77)
    search.masks_in_use = 0
    search.on_device(7)
    assert (get(search.work.bits)[:2] == packed[:2]).all() and packed.shape[0] == 5


def test_rows_beyond_those_in_use_are_never_hits() -> None:
    search = Search(7, 2, 500, 16, 1, 1.0)
    search.in_use = 211
    search.table[211:] = 100 * search.queries[0]
    assert_proven_and_exact(search, 300, capacity=512)
    search.in_use = 0
    assert_proven_and_exact(search, 3, capacity=512)


def test_ties_go_to_the_lower_slot_across_the_last_place() -> None:
    search = Search(9, 2, 400, 16, 1, 0.8)
    search.table = search.table[search.rng.integers(0, 5, 400)]
    assert_proven_and_exact(search, 50, capacity=512)


def test_rows_that_are_not_finite_or_beyond_float16_are_ranked_as_on_the_cpu() -> None:
    search = Search(11, 3, 300, 16, 1, 0.9)
    spoilt = search.rng.permutation(300)
    for value, at in ((np.nan, 20), (np.inf, 40), (-np.inf, 60), (1e6, 80), (-1e20, 100), (3e38, 120), (1e-30, 140)):
        search.table[spoilt[at - 20 : at], at % 16] = value
    assert_proven_and_exact(search, 200, capacity=512)


def test_scores_are_summed_in_the_cpus_order_and_lose_the_same_digits() -> None:
    """Two large products cancel, and what is left depends on what was added to them before."""
    search = Search(12, 2, 150, 21, 1, 1.0)
    search.table *= np.float32(1e4)
    search.queries[:, [2, 11]] = 1.0
    search.table[:, 2] = 1e20 * search.rng.uniform(0.5, 1.0, 150)
    search.table[:, 11] = -search.table[:, 2]
    assert_proven_and_exact(search, 150, capacity=256)


def test_a_score_that_underflows_is_zero_whatever_its_sign() -> None:
    search = Search(14, 1, 60, 3, 1, 1.0)
    search.queries[:], search.table[:] = [1e-30, 0, 0], 0
    search.table[:, 0] = np.where(np.arange(60) % 3 == 0, -1e-30, 1e-30)
    assert_proven_and_exact(search, 60, capacity=256)


@pytest.mark.parametrize("scale", [1e-42, 1e-38, 1e-6, 1e6, 1e30, 3e38])
def test_queries_of_any_length_are_ranked_as_on_the_cpu(scale: float) -> None:
    search = Search(13, 2, 700, 16, 1, 0.9)
    search.queries = (search.queries / np.abs(search.queries).max() * scale).astype(np.float32)
    found, unproven = search.on_device(12, capacity=256, sample_rows=256)
    expected = search.expected(12)
    for b in np.flatnonzero(unproven == 0):
        np.testing.assert_array_equal(found[0][b], expected[0][b])
    if 1e-6 <= scale <= 1e30:  # beyond, scores tie or overflow in masses, and nothing can be proven
        assert not unproven.any()


def test_queries_without_embedding_padding_and_unknown_masks_have_no_hits() -> None:
    search = Search(15, 5, 100, 16, 1, 1.0)
    search.table[3, 0] = 1e6  # always proposed
    search.queries[0] = 0.0
    search.queries[1, 3] = np.nan
    search.queries[2, 3] = -np.inf
    search.mask_of[3] = 1
    (slots, scores), unproven = search.on_device(5, capacity=256)
    assert (slots[:4] == -1).all() and np.isneginf(scores[:4]).all() and not unproven.any()
    assert (slots[4] >= 0).all()
    search.batch_in_use = 4
    (slots, _), unproven = search.on_device(5, capacity=256)
    assert (slots == -1).all() and not unproven.any()


def test_a_floor_that_was_too_high_is_found_out(monkeypatch: pytest.MonkeyPatch) -> None:
    """Only sampled rows are good, so the sample promises more than there is."""
    search = Search(17, 2, 2_560, 16, 1, 1.0)
    search.queries, search.table = np.abs(search.queries), -np.abs(search.table)
    search.table[::10] *= -1  # 256 rows, each of them sampled
    (slots, _), unproven = search.on_device(300, capacity=512, sample_rows=256)
    assert unproven.all()
    assert_same(search.slowly(300), search.expected(300))
    assert (slots[0] != search.expected(300)[0][0]).any()


def test_candidates_that_do_not_fit_are_found_out() -> None:
    search = Search(19, 2, 2_000, 16, 1, 1.0)
    search.table = np.repeat(search.table[:1], 2_000, axis=0)
    _, unproven = search.on_device(10, capacity=256, sample_rows=256)
    assert unproven.all()
    assert_same(search.slowly(10), search.expected(10))


def awkward_lengths(search: Search) -> None:
    search.table *= (10.0 ** search.rng.uniform(-9, 3, 600))[:, None].astype(np.float32)


def roundings_that_all_go_the_same_way(search: Search) -> None:
    search.queries[:], search.table[:] = 1 + 2.0**-11, 1 + 2.0**-11  # halfway between two of float16


def rows_that_vanish_in_float16(search: Search) -> None:
    search.queries[:], search.table[:] = 1.0, 2.0**-25


@pytest.mark.parametrize("make", [awkward_lengths, roundings_that_all_go_the_same_way, rows_that_vanish_in_float16])
def test_the_bound_covers_float16_products(make: Callable[[Search], None]) -> None:
    """The proof rests on it: no float16 score is further from the canonical one than claimed."""
    search = Search(21, 4, 600, 33, 1, 1.0)
    make(search)
    search.on_device(5, capacity=256, sample_rows=256)
    scaled = get(search.work.queries16).astype(np.float32) @ search.table.astype(np.float16).astype(np.float32).T
    for b, query in enumerate(search.queries):
        exact = canonical_inner_reference(query, search.table).astype(np.float64) * get(search.work.scales)[b]
        assert np.abs(scaled[b] - exact).max() <= get(search.work.errors)[b]


def test_an_answer_is_proven_only_above_floor_and_bound() -> None:
    search = Search(23, 1, 100, 16, 1, 1.0)
    (slots, scores), _ = search.on_device(30, capacity=256)
    worst = scores[0, -1] * get(search.work.scales)[0]
    for floor, expected in ((worst - 0.51, 0), (worst - 0.49, 1), (-np.inf, 0)):
        again = search.decide_again(np.arange(100, dtype=np.int32), 30, floor=floor, error=0.5)
        assert again[1][0] == expected
        assert_same(again[0], (slots, scores))
    assert search.decide_again(np.arange(20, dtype=np.int32), 30, floor=-9.0, error=0.5)[1][0] == 1


def test_the_order_in_which_candidates_are_found_changes_nothing() -> None:
    search = Search(25, 1, 200, 16, 1, 1.0)
    search.table = search.table[search.rng.integers(0, 50, 200)]
    answer, _ = search.on_device(30, capacity=256)
    for _ in range(3):
        shuffled = search.rng.permutation(200).astype(np.int32)
        assert_same(search.decide_again(shuffled, 30)[0], answer)


def test_the_slow_search_is_exact_over_several_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("kernels.canonical_gpu._SLOW_BLOCK_ROWS", 150)
    search = Search(25, 3, 400, 13, 2, 0.7)
    search.queries[1] = 0.0  # scored like any other
    search.table[5] = np.nan
    for k in (1, 33, 399):
        assert_same(search.slowly(k), search.expected(k))


def test_longest_is_a_bound_on_the_rows_that_float16_holds_and_never_falls() -> None:
    table, table16 = put(np.zeros((4, 3), np.float32)), put(np.zeros((4, 3), np.float16))
    longest = put(np.zeros(1, np.float32))
    rows = np.array([[3, 4, 0], [1e9, 0, 0], [np.nan, 0, 0], [9, 9, 9]], np.float32)
    put_rows(put(np.array([2, 0, 1, -1], np.int32)), put(rows), table=table, table16=table16, longest=longest)
    assert 5.0 <= get(longest)[0] < 5.0001
    assert np.isnan(get(table16)[:2]).all() and get(table16)[2].tolist() == [3, 4, 0] and not get(table16)[3].any()
    np.testing.assert_array_equal(get(table)[[2, 0, 1]], rows[:3])
    put_rows(put(np.array([2], np.int32)), put(rows[3:] / 9), table=table, table16=table16, longest=longest)
    assert get(longest)[0] >= 5.0


def test_arguments_of_the_wrong_type_and_sizes_are_named() -> None:
    search = Search(1, 1, 8, 4, 1, 1.0)
    search.mask_of = search.mask_of.astype(np.int64)  # type: ignore[assignment]
    with pytest.raises(ValueError, match=r"^mask_of: must be a tensor of torch\.int32"):
        search.on_device(2)
    with pytest.raises(ValueError, match=r"^capacity: must be a power of two"):
        TopkBuffers.allocate(1, 300, 10, 4, 1, DEVICE, capacity=256)
    with pytest.raises(ValueError, match=r"^sample_rows: must be a power of two"):
        TopkBuffers.allocate(1, 3, 10, 4, 1, DEVICE, sample_rows=100)
