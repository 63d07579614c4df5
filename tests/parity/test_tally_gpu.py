"""One batch through merge, blend, select, verify and encode: the device's replies and counts are the CPU's."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import torch

from kernels import blend, blend_gpu, merge, merge_gpu, slate, slate_gpu, verify, verify_gpu, wire, wire_gpu
from kernels.eligibility import Drop
from kernels.idmap import id_words
from kernels.slate import Outcome
from kernels.tally_gpu import SIZE, read_tally, tally
from tests.device import empty, get, put
from tests.parity.test_ranking_kernels import FILTERS, NOW, random_rows, weights
from tests.parity.test_slate import as_ids

ROWS, BATCH, DIM, RESERVE, LIMIT = 70, 4, 8, 4, 9
PERSONAL, FOLLOWED, FRESH, EXCLUDE = 1 << 0, 1 << 4, 1 << 5, 0b100101
PARAMS = np.array([0, 0, 0, 0, 600_000, NOW, 9999, 0], np.int64)


def make_batch(seed: int) -> dict[str, Any]:
    """Columns of a table and of a batch whose last request is padding."""
    rng = np.random.default_rng(seed)
    rows = random_rows(rng, ROWS)
    rows = rows._replace(
        state=np.where(rng.random(ROWS) < 0.1, 2, 1).astype(np.uint8),
        rule_bits=np.where(rng.random(ROWS) < 0.1, 4, 0).astype(np.uint32),
        age_rating=np.zeros(ROWS, np.int32),
        language=rng.integers(1, 3, ROWS, dtype=np.int32),
    )

    def lists(width: int) -> Any:
        rows = [rng.permutation(ROWS)[:width] for _ in range(BATCH)]
        return np.where(rng.random((BATCH, width)) < 0.2, -1, np.stack(rows)).astype(np.int32)

    # Whole numbers: sums are exact in any order, so both sides choose the same.
    return {
        "views": lists(30)[:3], "view_sources": rng.integers(1, 64, (3, 30), dtype=np.int32),
        "personal": lists(12), "followed": lists(5), "excluded": lists(6),
        "filter_of": np.array([0, 1, 0, 0], np.int32),
        "queries": rng.integers(-1, 2, (BATCH, DIM)).astype(np.float32),
        "embedding": rng.integers(-1, 2, (ROWS, DIM)).astype(np.float32),
        "trend": rng.integers(0, 5, ROWS).astype(np.float32), "boost": np.zeros(ROWS, np.float32),
        "started_ms": np.full(ROWS, NOW, np.int64),
        "weights": weights(rng, BATCH)._replace(similarity=np.full(BATCH, 0.5, np.float32)),
        "creator": rng.integers(0, 30, ROWS, dtype=np.int32),
        "ids": as_ids([b"stream-%03d" % row for row in rng.permutation(ROWS)]),
        "epoch": rng.integers(1, 9, ROWS), "lengths": np.full(ROWS, 10, np.uint8),
        "limits": np.array([LIMIT, 3, 6, 0], np.int32), "explore": np.array([2, 1, 0, 0], np.int32),
        "seeds": rng.integers(0, 2**63, BATCH).astype(np.uint64),
        "creator_caps": np.full(BATCH, 2, np.int32), "category_caps": np.full(BATCH, 3, np.int32),
        "diversity": np.array([0.25, 0, 0.5, 0], np.float32), "rows": rows,
    }  # fmt: skip


def on_cpu(c: dict[str, Any]) -> tuple[list[bytes], dict[str, Any]]:
    """Replies and counts of the requests in use, as `Pipeline` and `Recorder` make them."""
    b = BATCH - 1
    proposals = [(c["views"][c["filter_of"]], c["view_sources"][c["filter_of"]])]
    proposals += [
        (c[name], np.full(c[name].shape, bit)) for name, bit in (("personal", PERSONAL), ("followed", FOLLOWED))
    ]
    flat, bits = (np.concatenate([p[i] for p in proposals], axis=1)[:b] for i in (0, 1))
    offsets = np.arange(b + 1, dtype=np.int64)
    slots, sources, _, excluded = merge.merge_candidates(
        flat.ravel(), bits.ravel().astype(np.uint32), offsets * flat.shape[1], c["excluded"][:b].ravel(),
        offsets * c["excluded"].shape[1], ROWS,
    )  # fmt: skip
    utility, _ = blend.blend(
        slots, sources, c["queries"][:b], c["trend"], c["boost"], c["started_ms"], c["embedding"],
        blend.BlendWeights(*(w[:b] for w in c["weights"])),
        followed_bit=FOLLOWED, fresh_bit=FRESH, now_ms=NOW, fresh_age_ms=600_000,
    )  # fmt: skip
    names = ("limits", "explore", "seeds", "creator_caps", "category_caps", "diversity")
    chosen = slate.select_slates(
        slots, utility, (sources & FRESH) != 0, c["creator"], c["rows"].category, c["embedding"], c["ids"],
        *(c[name][:b] for name in names), RESERVE,
    )  # fmt: skip
    at = np.maximum(chosen.picks, 0)
    picks = np.where(chosen.picks >= 0, np.take_along_axis(slots, at, axis=1), -1).astype(np.int32)
    kept, counts, drops = verify.verify_picks(
        picks, chosen.n_slate + chosen.n_reserve, c["limits"][:b], c["filter_of"][:b], c["rows"], FILTERS, EXCLUDE, NOW
    )
    shown, column = kept >= 0, np.maximum(kept, 0)
    candidate = np.take_along_axis(at, column, axis=1)
    served = np.where(shown, np.take_along_axis(picks, column, axis=1), -1).astype(np.int32)
    served_sources = np.take_along_axis(sources, candidate, axis=1)
    chances = np.take_along_axis(chosen.exploration, column, axis=1)
    buffer, ends = wire.encode_streams(
        served, counts, np.take_along_axis(utility, candidate, axis=1), c["epoch"], c["rows"].lease_expires_ms,
        served_sources, chances, c["ids"], c["lengths"],
    )  # fmt: skip
    of_source = [1 << i for i in range(6)]
    return [buffer[i:j].tobytes() for i, j in pairwise(ends)], {
        "candidates": [np.count_nonzero(sources & bit) for bit in of_source],
        "served_by": [np.count_nonzero(served_sources[shown] & bit) for bit in of_source],
        "outcomes": [0, *(np.count_nonzero(chosen.outcome == code) for code in list(Outcome)[1:])],
        "drops": [np.count_nonzero(drops[picks >= 0] == code) for code in Drop],
        "excluded": excluded.sum(),
        "served": shown.sum(),
        "exploration_served": np.count_nonzero(shown & (chances > 0)),
    }


def on_device(c: dict[str, Any]) -> tuple[list[bytes], dict[str, Any]]:
    d = {name: put(values) for name, values in c.items() if isinstance(values, np.ndarray)}
    k, w = 30 + 12 + 5, LIMIT + RESERVE

    def ints(*shape: int) -> torch.Tensor:
        return empty(shape, torch.int32)

    def floats(*shape: int) -> torch.Tensor:
        return empty(shape, torch.float32)

    slots, sources, counts, excluded = ints(BATCH, k), ints(BATCH, k), ints(BATCH), ints(BATCH)
    merge_gpu.merge_candidates(
        d["views"], d["view_sources"], d["filter_of"], d["personal"], PERSONAL, d["followed"], FOLLOWED, d["excluded"],
        put(np.full(BATCH, 9999, np.int32)), put(PARAMS),
        slots=slots, sources=sources, counts=counts, dropped=excluded,
    )  # fmt: skip
    utility, similarity = floats(BATCH, k), floats(BATCH, k)
    blend_gpu.blend(
        slots, sources, d["queries"], d["trend"], d["boost"], d["started_ms"], d["embedding"],
        put(np.stack(c["weights"])), put(PARAMS), followed_bit=FOLLOWED, fresh_bit=FRESH,
        utility=utility, similarity=similarity,
    )  # fmt: skip
    rows, filters = verify_gpu.RowTensors(*map(put, c["rows"])), verify_gpu.FilterTensors(*map(put, FILTERS))
    picks, chances, n_slate, n_reserve = ints(BATCH, w), floats(BATCH, w), ints(BATCH), ints(BATCH)
    outcome = empty((BATCH, k), torch.uint8)
    slate_gpu.select_slates(
        slots, utility, sources, d["creator"], rows.category, d["embedding"], put(id_words(c["ids"])),
        d["limits"], d["explore"], d["seeds"], d["creator_caps"], d["category_caps"], d["diversity"], RESERVE,
        explorable_bit=FRESH, order=empty((BATCH, k), torch.int64),
        picks=picks, exploration=chances, n_slate=n_slate, n_reserve=n_reserve, outcome=outcome,
    )  # fmt: skip
    out = (ints(BATCH, LIMIT), floats(BATCH, LIMIT), ints(BATCH, LIMIT), floats(BATCH, LIMIT))
    pick_slots, drops, served = ints(BATCH, w), empty((BATCH, w), torch.uint8), ints(BATCH)
    verify_gpu.verify_picks(
        picks, n_slate, n_reserve, chances, slots, utility, sources, d["limits"], d["filter_of"], rows, filters,
        put(np.array([NOW, ROWS, BATCH - 1, EXCLUDE, 0, 0, 0, 0], np.int64)),
        out_slots=out[0], out_scores=out[1], out_sources=out[2], out_exploration=out[3], counts=served,
        pick_slots=pick_slots, drops=drops,
    )  # fmt: skip
    buffer, lengths = empty((BATCH, LIMIT * wire_gpu.ENTRY_BYTES), torch.uint8), ints(BATCH)
    wire_gpu.encode_streams(
        out[0], served, out[1], d["epoch"], rows.lease_expires_ms, out[2], out[3], put(id_words(c["ids"])),
        d["lengths"], buffer=buffer, lengths=lengths,
    )  # fmt: skip
    counted = ints(SIZE)
    tally(slots, sources, outcome, excluded, d["limits"], pick_slots, drops, out[0], out[2], out[3], counts=counted)
    replies = [row[:n].tobytes() for row, n in zip(get(buffer), get(lengths), strict=True)]
    assert replies.pop() == b"", "a padding request was answered"
    return replies, read_tally(get(counted), 6)._asdict()


@pytest.mark.parametrize("seed", range(3))
def test_a_batch_through_every_stage_has_the_replies_and_the_counts_of_the_cpu(seed: int) -> None:
    columns = make_batch(seed)
    replies, counts = on_device(columns)
    expected_replies, expected_counts = on_cpu(columns)
    assert replies == expected_replies
    assert sum(map(len, replies)) > 300, "a case that tells nothing"
    for name, count in expected_counts.items():
        np.testing.assert_array_equal(counts[name], count, err_msg=name)


def test_a_wrong_argument_is_named() -> None:
    cells = torch.zeros((1, 2), dtype=torch.int32)
    bytes_, floats = cells.to(torch.uint8), cells.float()
    with pytest.raises(ValueError, match=r"^counts: must have shape \[72\]"):
        tally(cells, cells, bytes_, cells[0, :1], cells[0, :1], cells, bytes_, cells, cells, floats, counts=cells[0])
