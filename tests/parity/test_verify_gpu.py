"""The GPU's last check, and its masks of the search, against the CPU's."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from kernels.eligibility import Drop, FilterColumns, RowColumns, check_rows
from kernels.verify import verify_picks_reference
from kernels.verify_gpu import FilterTensors, RowTensors, eligible_rows, verify_picks
from tests.device import empty, get, put
from tests.parity.test_ranking_kernels import FILTERS, NOW, random_rows

EXCLUDE = 0b100101 | 1 << 31


def params(rows: int, exclude: int = EXCLUDE) -> torch.Tensor:
    return put(np.array([NOW, rows, 1, exclude, 600_000, 0, 0, 0], np.int64))


def tensors(rows: RowColumns, filters: FilterColumns = FILTERS) -> tuple[RowTensors, FilterTensors]:
    return RowTensors(*map(put, rows)), FilterTensors(*map(put, filters))


@pytest.mark.parametrize(("capacity", "used"), [(1, 1), (700, 700), (700, 530), (40, 0)])
def test_the_masks_of_every_filter_are_the_predicate_of_the_last_check(capacity: int, used: int) -> None:
    rows = random_rows(np.random.default_rng(capacity), capacity)
    rows.rule_bits[::9] = 1 << 31  # the sign bit on the device
    eligible = empty((3, capacity), torch.uint8)
    eligible_rows(*tensors(rows), params(used), eligible=eligible)
    for v in range(3):
        codes = check_rows(rows, np.arange(capacity, dtype=np.int32), FILTERS, v, EXCLUDE, NOW)
        assert np.array_equal(get(eligible)[v], (codes == Drop.KEPT) & (np.arange(capacity) < used))


def check_on_device(rows: RowColumns, problem: dict[str, Any], out_width: int) -> dict[str, Any]:
    p = problem
    batch, picks_width = p["picks"].shape
    out = {
        "out_slots": empty((batch, out_width), torch.int32),
        "out_scores": empty((batch, out_width), torch.float32),
        "out_sources": empty((batch, out_width), torch.int32),
        "out_exploration": empty((batch, out_width), torch.float32),
        "counts": empty((batch,), torch.int32),
        "pick_slots": empty((batch, picks_width), torch.int32),
        "drops": empty((batch, picks_width), torch.uint8),
    }
    names = ("picks", "n_slate", "n_reserve", "exploration", "slots", "utility", "sources", "limits", "filter_of")
    verify_picks(*[put(p[name]) for name in names], *tensors(rows), params(len(rows.state)), **out)
    return {name: get(tensor) for name, tensor in out.items()}


@pytest.mark.parametrize("seed", range(12))
def test_the_last_check_on_the_device_keeps_drops_and_gathers_as_the_cpu_does(seed: int) -> None:
    rng = np.random.default_rng(seed)
    rows = random_rows(rng, 40)
    batch, width, picks_width = int(rng.integers(1, 6)), 45, int(rng.integers(1, 30))
    problem: dict[str, Any] = {
        "slots": np.where(rng.random((batch, width)) < 0.1, -1, rng.integers(0, 40, (batch, width))).astype(np.int32),
        "utility": rng.standard_normal((batch, width)).astype(np.float32),
        "sources": rng.integers(0, 64, (batch, width), dtype=np.int32),
        "picks": np.full((batch, picks_width), -1, np.int32),
        "exploration": rng.random((batch, picks_width)).astype(np.float32),
        "n_slate": np.zeros(batch, np.int32), "n_reserve": np.zeros(batch, np.int32),
        "limits": rng.integers(0, 12, batch).astype(np.int32),
        "filter_of": rng.integers(0, 3, batch).astype(np.int32),
    }  # fmt: skip
    for b in range(batch):
        picked = rng.permutation(np.flatnonzero(problem["slots"][b] >= 0))[: rng.integers(0, picks_width + 1)]
        problem["picks"][b, : len(picked)] = picked
        problem["n_slate"][b] = rng.integers(0, len(picked) + 1)
        problem["n_reserve"][b] = len(picked) - problem["n_slate"][b]
    slots_of_picks = np.take_along_axis(problem["slots"], np.maximum(problem["picks"], 0), axis=1)
    slots_of_picks = np.where(problem["picks"] >= 0, slots_of_picks, -1).astype(np.int32)
    kept, counts, drops = verify_picks_reference(
        slots_of_picks, problem["n_slate"] + problem["n_reserve"], problem["limits"], problem["filter_of"], rows,
        FILTERS, EXCLUDE, NOW,
    )  # fmt: skip
    got = check_on_device(rows, problem, out_width=15)
    np.testing.assert_array_equal(got["counts"], counts)
    np.testing.assert_array_equal(got["drops"], drops)
    np.testing.assert_array_equal(got["pick_slots"], slots_of_picks)
    for b in range(batch):
        column, n = kept[b, : counts[b]], counts[b]
        candidate = problem["picks"][b, column]
        np.testing.assert_array_equal(got["out_slots"][b], [*slots_of_picks[b, column], *[-1] * (15 - n)])
        np.testing.assert_array_equal(got["out_scores"][b], [*problem["utility"][b, candidate], *[0] * (15 - n)])
        np.testing.assert_array_equal(got["out_sources"][b], [*problem["sources"][b, candidate], *[0] * (15 - n)])
        chances = [*problem["exploration"][b, column], *[0] * (15 - n)]
        np.testing.assert_array_equal(got["out_exploration"][b], chances)


def test_a_name_interned_after_the_filter_was_built_does_not_match_it() -> None:
    one = np.zeros(1, np.int32)
    fine = RowColumns(np.ones(1, np.uint8), np.array([NOW + 1]), np.zeros(1, np.uint32), one, one, one, one)
    no, yes = np.zeros(2, bool), np.ones(2, bool)
    # The first number beyond filter 0's names lies where filter 1's names begin.
    names = np.array([[0, 0, 0], [1, 1, 1]], bool)
    regions, ages = np.full(2, -1, np.int32), np.full(2, 18, np.int32)
    for changed, filters in (
        ("language", FilterColumns(regions, ages, no, names, yes, names)),
        ("category", FilterColumns(regions, ages, yes, names, no, names)),
    ):
        for number, passes in ((2, [[0], [1]]), (3, [[0], [0]])):
            rows = fine._replace(**{changed: np.array([number], np.int32)})
            eligible = empty((2, 1), torch.uint8)
            eligible_rows(*tensors(rows, filters), params(1), eligible=eligible)
            assert get(eligible).tolist() == passes, changed


def test_without_any_name_interned_a_filter_by_name_matches_nothing() -> None:
    rows = random_rows(np.random.default_rng(2), 1)._replace(
        state=np.ones(1, np.uint8), lease_expires_ms=np.array([NOW + 1]), rule_bits=np.zeros(1, np.uint32),
        region=np.zeros(1, np.int32), age_rating=np.zeros(1, np.int32),
    )  # fmt: skip
    one = np.ones(1, bool)
    filters = FilterColumns(
        np.array([-1], np.int32), np.array([18], np.int32), ~one, np.zeros((1, 0), bool), one, np.zeros((1, 0), bool)
    )
    eligible = empty((1, 1), torch.uint8)
    eligible_rows(*tensors(rows, filters), params(1), eligible=eligible)
    assert get(eligible).tolist() == [[0]]


def test_a_wrong_column_is_named() -> None:
    rows, filters = tensors(random_rows(np.random.default_rng(1), 4))
    bad = rows._replace(language=rows.language.to(torch.int64))
    with pytest.raises(ValueError, match=r"^rows\.language: must be a tensor of torch\.int32"):
        eligible_rows(bad, filters, params(4), eligible=empty((3, 4), torch.uint8))
    with pytest.raises(ValueError, match=r"^filters\.categories: must have shape \[3, any\]"):
        eligible_rows(rows, filters._replace(categories=filters.categories[:2]), params(4), eligible=rows.state)
