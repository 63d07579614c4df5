"""Tensors through shared memory with a real Triton: same scores, and what happens when either side goes away."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray
from tritonclient.grpc import InferenceServerClient

from server.errors import BadScores, ScorerTimeout, ScorerUnavailable, ScoringError, SharedMemoryRefused
from server.scoring import shared_memory, system_shm
from server.scoring.base import Scores
from server.scoring.system_shm import SystemSharedMemory
from server.scoring.transport import Auto, Transport, open_transport
from server.scoring.triton import TritonScorer
from tests import triton_server as ts
from tests.app import put_current_model, running_app

WAYS: dict[str, Callable[[str], Transport]] = {
    "plain": lambda address: open_transport("plain", address),
    "system_shm": lambda address: open_transport("system_shm", address),
    "auto": lambda address: open_transport("auto", address),
}


@pytest.fixture(scope="module")
def triton(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ts.RunningTriton]:
    path = tmp_path_factory.mktemp("repository")
    ts.put_model(path, "trendiness", ts.small_net())
    ts.put_model(path, "two_columns", ts.two_columns_out())
    ts.put_model(path, "endless", ts.endless())
    put_current_model(path / "app")
    (path / "app" / "trendiness").rename(path / "current")
    config = path / "current" / "config.pbtxt"
    config.write_text(config.read_text().replace('name: "trendiness"', 'name: "current"'))
    (path / "app").rmdir()
    log = tmp_path_factory.mktemp("log") / "triton.log"
    with ts.running_triton(path, log, "trendiness", "two_columns", "endless", "current") as running:
        yield running


@pytest.fixture(autouse=True)
def patient(monkeypatch: pytest.MonkeyPatch) -> None:
    """A busy machine is no reason to leave a region behind."""
    monkeypatch.setattr(shared_memory, "CLOSE_S", 20.0)


def scorer_for(address: str, tensors: Transport, model: str = "trendiness") -> TritonScorer:
    return TritonScorer(address, model, ts.SCHEMA, ts.N_FEATURES, tensors)


def features(rows: int, seed: int = 0) -> NDArray[np.float32]:
    return np.random.default_rng(seed).uniform(0, 1, (rows, ts.N_FEATURES)).astype(np.float32)


def regions() -> set[str]:
    """Shared memory of this process that still has a name. A scorer of another test, given up while its Triton hung,
    may still hold one."""
    return {path.name for path in system_shm.SHM.glob(f"{system_shm.PREFIX}-*-{os.getpid()}-*")}


def registered(address: str) -> list[str]:
    """What Triton has mapped of this process."""
    with InferenceServerClient(address) as client:
        status = client.get_system_shared_memory_status()
    return [name for name in status.regions if f"-{os.getpid()}-" in name]


def test_every_way_gives_the_same_scores_whatever_the_size(triton: ts.RunningTriton) -> None:
    before = regions()
    scorers = {way: scorer_for(triton.address, make(triton.address)) for way, make in WAYS.items()}
    for rows in (1, 1_000, 1_024, 5_000, 3, 65_536):  # the region grows, and is then larger than needed
        x = features(rows, seed=rows)
        plain = scorers["plain"].score(x, 10.0)
        for way, scorer in scorers.items():
            scores = scorer.score(x, 10.0)
            np.testing.assert_array_equal(scores.values, plain.values, err_msg=way)
            assert scores.model_version == plain.model_version
    assert {way: scorer.transport for way, scorer in scorers.items()} == {
        "plain": "plain", "system_shm": "system_shm", "auto": "system_shm",
    }  # fmt: skip
    assert regions() <= before, "a region has no name once Triton has mapped it"
    assert len(registered(triton.address)) == 2
    kept = scorers["system_shm"].score(features(4), 10.0).values
    before = kept.copy()
    scorers["system_shm"].score(features(4, seed=9), 10.0)
    np.testing.assert_array_equal(kept, before, err_msg="scores are the caller's, not the region's")
    for scorer in scorers.values():
        scorer.close()
    assert registered(triton.address) == []


@pytest.mark.parametrize("rows", [10, 1_024])
def test_a_model_that_answers_more_than_one_score_per_row_is_bad_scores(triton: ts.RunningTriton, rows: int) -> None:
    scorer = scorer_for(triton.address, SystemSharedMemory(), "two_columns")
    for _ in range(4):
        with pytest.raises(BadScores, match=rf"\[{rows}, 2\]|at least {8 * rows} bytes"):
            scorer.score(features(rows), 5.0)
    assert scorer.heals == scorer.heal_failures == 0
    scorer.close()


def test_shared_memory_recovers_by_itself_after_triton_was_killed(tmp_path: Path) -> None:
    before = regions()
    ts.put_model(tmp_path / "repository", "trendiness", ts.small_net())
    with ts.running_triton(tmp_path / "repository", tmp_path / "1.log", "trendiness") as triton:
        port, address = triton.port, triton.address
        noticing = scorer_for(address, SystemSharedMemory())
        silent = scorer_for(address, SystemSharedMemory())
        expected = noticing.score(features(50), 5.0).values
        silent.score(features(50), 5.0)
        triton.kill()
    with pytest.raises(ScorerUnavailable):
        noticing.score(features(50), 1.0)
    with ts.running_triton(tmp_path / "repository", tmp_path / "2.log", "trendiness", port=port):

        def answer(scorer: TritonScorer) -> Scores | None:
            try:
                return scorer.score(features(50), 2.0)
            except ScoringError:
                return None

        for scorer in (noticing, silent):
            scores = ts.eventually(lambda scorer=scorer: answer(scorer))
            np.testing.assert_array_equal(scores.values, expected)
            assert scorer.transport == "system_shm"
            scorer.close()
        assert registered(address) == [] and regions() <= before


def test_a_triton_that_forgot_the_region_is_told_again_within_the_same_call(triton: ts.RunningTriton) -> None:
    scorer = scorer_for(triton.address, SystemSharedMemory())
    expected = scorer.score(features(20), 5.0).values
    with InferenceServerClient(triton.address) as client:
        client.unregister_system_shared_memory()  # of all regions, as a restart would
    np.testing.assert_array_equal(scorer.score(features(20), 5.0).values, expected)
    scorer.close()


def test_a_region_that_triton_cannot_map_is_refused_and_auto_goes_plain(
    triton: ts.RunningTriton, tmp_path: Path
) -> None:
    elsewhere = tmp_path / "shm"  # Triton in a container with a /dev/shm of its own
    elsewhere.mkdir()
    alone = scorer_for(triton.address, SystemSharedMemory(folder=elsewhere))
    with pytest.raises(SharedMemoryRefused, match="Triton cannot map"):
        alone.score(features(5), 5.0)
    refusals: list[int] = []
    auto = scorer_for(triton.address, Auto(SystemSharedMemory(folder=elsewhere), lambda: refusals.append(1)))
    for _ in range(3):
        assert len(auto.score(features(5), 5.0).values) == 5
    assert auto.transport == "plain" and refusals == [1], "asked once, then left alone for a while"
    assert list(elsewhere.iterdir()) == []
    alone.close()
    auto.close()


def test_regions_of_servers_that_are_gone_are_removed_and_those_of_others_are_not(tmp_path: Path) -> None:
    ended = subprocess.Popen([sys.executable, "-c", ""])
    ended.wait()
    family = system_shm._family()
    stale = tmp_path / f"{family}-{ended.pid}-ab"
    ours, foreign = tmp_path / f"{family}-{os.getpid()}-ab", tmp_path / f"{system_shm.PREFIX}-1-{ended.pid}-ab"
    for path in (stale, ours, foreign):
        path.write_bytes(b"x")
    SystemSharedMemory(folder=tmp_path)
    assert sorted(tmp_path.iterdir()) == sorted([ours, foreign])


def test_the_way_in_use_is_in_status_and_metrics(triton: ts.RunningTriton, tmp_path: Path) -> None:
    from liverank.v1 import admin_pb2

    scoring = {"mode": "triton", "triton_address": triton.address, "model_name": "current"}
    with running_app(tmp_path, scoring=scoring) as client:
        client.tick()
        status = client.admin.Status(admin_pb2.StatusRequest())
        assert status.scoring_transport == "system_shm"
        registry = client.app.metrics.registry
        assert registry.get_sample_value("liverank_model_transport", {"transport": "system_shm"}) == 1.0
        assert registry.get_sample_value("liverank_model_transport", {"transport": "plain"}) == 0.0
        assert registry.get_sample_value("liverank_model_transport_fallbacks_total") == 0.0


def test_a_call_that_timed_out_never_shares_its_region_with_a_later_one(triton: ts.RunningTriton) -> None:
    # Last in this file: the endless calls keep a core busy until this Triton is ended.
    tensors = SystemSharedMemory()
    slow = scorer_for(triton.address, tensors, "endless")
    fast = scorer_for(triton.address, tensors)
    fast.score(features(10), 5.0)
    (used,) = registered(triton.address)
    with pytest.raises(ScorerTimeout):
        slow.score(features(10), 0.5)
    assert len(fast.score(features(10), 5.0).values) == 10
    assert used in registered(triton.address), "Triton still runs the call that reads and writes it"
    assert len(registered(triton.address)) == 2
    for _ in range(shared_memory.MAX_GIVEN_UP - 1):
        another = scorer_for(triton.address, tensors, "endless")  # one that timed out often would ask for the cause
        with pytest.raises(ScorerTimeout):
            another.score(features(10), 0.3)
    with pytest.raises(SharedMemoryRefused, match="still used by calls that timed out"):
        fast.score(features(10), 5.0)
    refusals: list[int] = []
    auto = scorer_for(triton.address, Auto(tensors, lambda: refusals.append(1)))
    assert len(auto.score(features(10), 5.0).values) == 10
    assert auto.transport == "plain" and refusals == [1]
    fast.close()
