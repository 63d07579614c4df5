"""An approximate index answers only while its measured recall holds, and is never wrong about what may be shown."""

from __future__ import annotations

import threading
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from server.errors import ConfigError
from server.retrieval.base import Hits
from server.retrieval.exact import ExactSearch
from server.retrieval.gate import ApproximateIndex, GatedSearch, GatePolicy
from server.retrieval.recall import Mode, RecallGate, lower_bound, recall_of
from server.retrieval.registry import make_search
from server.telemetry.metrics import Metrics
from tests.triton_server import eventually

ROWS, DIM, K = 600, 8, 10


class PerfectIndex:
    """Scans its copy of the rows."""

    def __init__(self, rows: Any) -> None:
        self.rows = rows.copy()

    def search(self, queries: Any, k: int) -> Any:
        order = np.argsort(-(queries @ self.rows.T), axis=1, kind="stable")[:, :k]
        return order.astype(np.int32)


class BlindIndex(PerfectIndex):
    """Does not see the odd rows."""

    def search(self, queries: Any, k: int) -> Any:
        found = super().search(queries, k)
        return np.where(found % 2 == 0, found, -1)


class HnswIndex:
    """FAISS's graph on the CPU: a real approximate index."""

    def __init__(self, rows: Any) -> None:
        import faiss

        self.index = faiss.IndexHNSWFlat(rows.shape[1], 16, faiss.METRIC_INNER_PRODUCT)
        self.index.hnsw.efSearch = 128
        self.index.add(rows.copy())

    def search(self, queries: Any, k: int) -> Any:
        return self.index.search(queries, k)[1].astype(np.int32)


class World:
    """A gated engine with time in the test's hands."""

    def __init__(self, build: Any, rows: int = ROWS, **policy: int) -> None:
        self.rng = np.random.default_rng(5)
        self.now_s = 0.0
        self.metrics = Metrics()
        self.gate = RecallGate(threshold=0.9, window=60, share=0.5)
        self.exact = ExactSearch(rows, DIM)
        self.engine = GatedSearch(self.exact, build, self.gate, GatePolicy(**policy), self.metrics, lambda: self.now_s)
        self.engine.write_rows(
            np.arange(rows, dtype=np.int32), self.rng.standard_normal((rows, DIM)).astype(np.float32)
        )
        self.eligible = np.ones((1, rows), np.bool_)

    def ask(self, batch: int = 20, queries: Any = None) -> Hits:
        if queries is None:
            queries = self.rng.standard_normal((batch, DIM)).astype(np.float32)
        return self.engine.search(queries, self.eligible, np.zeros(len(queries), np.int32), K)

    def build(self) -> None:
        """Asks until a new index was taken over."""
        before = self.count("index_builds")
        eventually(lambda: bool(self.ask(0)) and self.count("index_builds") > before)

    def prove(self) -> None:
        self.build()
        for _ in range(6):
            self.ask()

    def count(self, name: str, *labels: str) -> float:
        return sum(
            sample.value
            for metric in getattr(self.metrics, name).collect()
            for sample in metric.samples
            if sample.name.endswith("_total") and set(labels) <= set(sample.labels.values())
        )


def test_a_good_index_answers_after_its_recall_was_proven_and_not_before() -> None:
    world = World(PerfectIndex)
    world.ask()
    world.build()
    assert world.engine.mode is Mode.PROVING
    world.ask()
    assert world.engine.mode is Mode.PROVING and not world.count("searched_queries", "approximate")
    for _ in range(5):
        world.ask()
    assert world.engine.mode is Mode.APPROXIMATE
    assert world.count("searched_queries", "approximate") and world.count("searched_queries", "measured")
    assert world.metrics.retrieval_approximate._value.get() == 1


def test_a_real_graph_index_is_proven_and_answers_like_the_exact_engine() -> None:
    world = World(HnswIndex)
    world.prove()
    assert world.engine.mode is Mode.APPROXIMATE
    queries = world.rng.standard_normal((40, DIM)).astype(np.float32)
    exact = world.exact.search(queries, world.eligible, np.zeros(40, np.int32), K)
    assert recall_of(world.ask(queries=queries), exact).mean() > 0.95


def test_a_bad_index_never_answers_and_is_watched_again_only_after_the_next_build() -> None:
    world = World(BlindIndex, rebuild_ms=10_000)
    world.prove()
    assert world.engine.mode is Mode.EXACT
    assert world.count("recall_gate_changes", "exact", "not_proven") == 1
    world.ask()
    assert world.engine.mode is Mode.EXACT and world.count("searched_queries", "approximate") == 0
    world.now_s = 20.0
    world.build()
    assert world.engine.mode is Mode.PROVING


def test_recall_that_falls_while_it_answers_gives_way_to_exact_by_itself_until_rebuilt_and_proven(
    caplog: pytest.LogCaptureFixture,
) -> None:
    indexes: list[PerfectIndex] = []

    def build(rows: Any) -> ApproximateIndex:
        indexes.append(PerfectIndex(rows))
        return indexes[-1]

    world = World(build, rebuild_ms=10_000)
    world.prove()
    assert world.engine.mode is Mode.APPROXIMATE
    indexes[-1].rows[::2] = 0.0  # the graph rots
    for _ in range(5):
        world.ask()
    assert world.engine.mode is Mode.EXACT
    assert world.count("recall_gate_changes", "exact", "recall") == 1
    assert "approximate → exact" in caplog.text
    queries = world.rng.standard_normal((20, DIM)).astype(np.float32)
    expected = world.exact.search(queries, world.eligible, np.zeros(20, np.int32), K)
    np.testing.assert_array_equal(world.ask(queries=queries).slots, expected.slots)
    world.now_s = 20.0
    world.prove()
    assert world.engine.mode is Mode.APPROXIMATE


def test_rows_changed_since_the_build_are_found_moved_or_gone_at_once() -> None:
    world = World(PerfectIndex)
    world.prove()
    query = np.full((1, DIM), 1.0, np.float32)
    best = world.exact.search(query, world.eligible, np.zeros(1, np.int32), 1).slots[0, 0]
    world.engine.write_rows(np.array([best, 77], np.int32), np.array([[-9.0] * DIM, [9.0] * DIM], np.float32))
    world.eligible[0, 78] = False
    assert world.engine.mode is Mode.APPROXIMATE
    for _ in range(2):  # one of two is measured, hence exact
        hits = world.ask(queries=query)
        assert hits.slots[0, 0] == 77 and best not in hits.slots and 78 not in hits.slots


def test_a_changed_row_that_the_index_proposes_too_takes_one_place() -> None:
    world = World(PerfectIndex)
    world.prove()
    query = np.full((1, DIM), 1.0, np.float32)
    best = world.exact.search(query, world.eligible, np.zeros(1, np.int32), 1).slots[0]
    world.engine.write_rows(best, world.engine.embeddings[best] * np.float32(1.5))
    for _ in range(2):
        slots = world.ask(queries=query).slots[0]
        assert len(set(slots.tolist())) == K and slots[0] == best[0]


def test_rows_written_during_a_build_count_as_changed_since() -> None:
    go_on, begun = threading.Event(), threading.Event()

    def build(rows: Any) -> ApproximateIndex:
        index = PerfectIndex(rows)
        begun.set()
        go_on.wait(10)
        return index

    world = World(build)
    world.ask()
    assert begun.wait(10)
    world.engine.write_rows(np.array([5], np.int32), np.full((1, DIM), 9.0, np.float32))
    go_on.set()
    world.prove()
    assert world.engine.mode is Mode.APPROXIMATE
    for _ in range(2):
        assert world.ask(queries=np.ones((1, DIM), np.float32)).slots[0, 0] == 5


def test_too_many_changed_rows_make_the_index_stale_and_begin_the_next_at_once() -> None:
    world = World(PerfectIndex, max_changed_rows=50)
    world.prove()
    world.engine.write_rows(np.arange(51, dtype=np.int32), np.zeros((51, DIM), np.float32))
    builds = world.count("index_builds")
    world.ask()
    assert world.engine.mode is Mode.EXACT and world.count("recall_gate_changes", "exact", "stale") == 1
    eventually(lambda: bool(world.ask(0)) and world.count("index_builds") > builds)
    assert world.engine.mode is Mode.PROVING


def test_a_filter_that_leaves_the_index_too_little_is_answered_exactly_and_counted() -> None:
    world = World(PerfectIndex)
    world.prove()
    world.eligible[:] = False
    world.eligible[0, ::50] = True
    queries = world.rng.standard_normal((7, DIM)).astype(np.float32)
    expected = world.exact.search(queries, world.eligible, np.zeros(7, np.int32), K)
    np.testing.assert_array_equal(world.ask(queries=queries).slots, expected.slots)
    assert world.count("searched_queries", "short") > 0 and world.engine.fallback_queries > 0


def test_a_build_that_fails_is_counted_and_tried_again_and_the_exact_engine_goes_on() -> None:
    def build(rows: Any) -> ApproximateIndex:
        raise RuntimeError("out of memory")

    world = World(build, rebuild_ms=10_000)
    world.build()
    assert world.count("index_builds", "failed") == 1 and world.engine.mode is Mode.EXACT
    assert (world.ask().slots >= 0).all()
    world.now_s = 20.0
    world.build()
    assert world.count("index_builds", "failed") == 2


@settings(max_examples=50, deadline=None)
@given(share=st.floats(0.001, 1.0), batches=st.lists(st.integers(0, 40), max_size=30))
def test_the_measured_share_is_kept_across_batches_of_any_sizes(share: float, batches: list[int]) -> None:
    gate = RecallGate(0.5, 100, share)
    picked = sum(int(gate.pick(batch).sum()) for batch in batches)
    assert abs(picked - share * sum(batches)) < 1.001


@settings(max_examples=50, deadline=None)
@given(st.lists(st.floats(0.0, 1.0), min_size=1, max_size=200))
def test_the_bound_lies_below_the_mean_and_rises_with_evidence(recalls: list[float]) -> None:
    values = np.array(recalls)
    assert 0.0 <= lower_bound(values) <= values.mean()
    assert lower_bound(np.ones(10)) < lower_bound(np.ones(100)) < 1.0


def test_equal_scores_count_as_found_and_queries_without_hits_not_at_all() -> None:
    exact = Hits(np.array([[1, 2], [-1, -1]], np.int32), np.array([[3.0, 1.0], [-np.inf, -np.inf]], np.float32))
    other = Hits(np.array([[1, 9], [-1, -1]], np.int32), np.array([[3.0, 1.0], [-np.inf, -np.inf]], np.float32))
    assert recall_of(other, exact).tolist() == [1.0]
    worse = Hits(other.slots, np.array([[3.0, 0.5], [-np.inf, -np.inf]], np.float32))
    assert recall_of(worse, exact).tolist() == [0.5]


def test_a_window_in_which_nothing_can_be_proven_is_refused() -> None:
    with pytest.raises(ValueError, match=r"^window: 20 measurements cannot prove a recall of 0\.99"):
        RecallGate(0.99, 20, 0.1)


def test_cagra_without_a_faiss_that_has_it_is_refused_at_the_start() -> None:
    from server.config import parse_settings

    faiss = pytest.importorskip("faiss")
    if hasattr(faiss, "GpuIndexCagra"):
        pytest.skip("this FAISS has CAGRA")
    chosen = parse_settings({"retrieval": {"approximate": {"index": "cagra"}}}).retrieval
    with pytest.raises(ConfigError, match="built without CAGRA; install faiss-gpu-cuvs"):
        make_search(chosen, 10, 4, Metrics())
    with pytest.raises(ConfigError, match="too short to ever prove a recall"):
        parse_settings({"retrieval": {"approximate": {"recall": 0.999, "window": 100}}})
