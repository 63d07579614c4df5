"""`liverank bench serve` as a user runs it, on a tiny grid, and the servers that it compares."""

from __future__ import annotations

import asyncio
import json
import os
from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from liverank.v1 import ranking_pb2

from loadtest.bench import serve
from loadtest.bench.catalogue import LANGUAGES, as_bytes, rank_requests
from loadtest.bench.contestants import (
    BEHIND_EDGES,
    CONSTANT,
    OURS,
    OURS_RANKED,
    TEXTBOOK,
    TEXTBOOK_LEAN,
    TEXTBOOK_RANKED,
    THREADS,
    Contestant,
    contestants,
)
from loadtest.bench.serve import DEFAULT, QUICK, plan_from
from loadtest.bench.textbook import HEAD_WEIGHTS, RANKED, Textbook
from server.__main__ import main
from server.config import RankerSettings, RankSettings
from server.rules.rulebook import RuleBook
from tests.app import FEATURES

STREAMS = 300


def children() -> set[int]:
    """Process ids of this process's children."""
    tasks = Path(f"/proc/{os.getpid()}/task").glob("*/children")
    return {int(pid) for task in tasks for pid in task.read_text().split()}


@pytest.fixture(scope="module")
def servers(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Contestant]]:
    """Started once for the bench and for what is asked of them beside it."""
    before = children()
    with contestants(tmp_path_factory.mktemp("bench"), STREAMS, as_bytes(rank_requests(2))[1]) as running:
        yield running
    assert all(c.server.process.poll() == 0 for c in running.values()), "stopped in order, though they were asleep"
    assert children() <= before


def test_the_quick_form_prints_tables_then_one_line_of_json(
    servers: dict[str, Contestant], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def started_already(folder: Path, streams: int, sample: bytes, every: bool) -> nullcontext[dict[str, Contestant]]:
        assert streams == STREAMS and every
        return nullcontext(servers)

    monkeypatch.setattr(serve, "contestants", started_already)
    grid = ["--streams", str(STREAMS), "--concurrency", "1", "4", "--seconds", "0.1"]
    assert main(["bench", "serve", "--quick", *grid]) == 0
    said = json.loads(capsys.readouterr().out.splitlines()[-1])
    positive = (
        "rps", "cpu_ms_per_reply", "p50_ms", "p99_ms", "ceiling_rps", "ceiling_cpu_ratio", "textbook_rps",
        "textbook_cpu_ms_per_reply", "speedup", "batch_speedup",
    )  # fmt: skip
    assert all(said[key] > 0 for key in positive)
    assert (said["streams"], said["concurrency"], said["errors"]) == (STREAMS, 4, 0)
    assert [(row["streams"], row["concurrency"]) for row in said["rows"]] == [(STREAMS, 1), (STREAMS, 4)]
    assert [row["server"] for row in said["open_loop"]] == [OURS] + 3 * [TEXTBOOK, OURS]
    assert list(said["p99_ratio"]) == ["70%", "90%", "100%"] and all(ratio > 0 for ratio in said["p99_ratio"].values())
    assert said["commit"] and said["machine"] and said["client"] and said["floor"]
    ranked = said["with_ranker"]
    best = ranked["model_cpu_ms_per_viewer"][str(ranked["best_viewers_per_call"])]
    assert best == min(ranked["model_cpu_ms_per_viewer"].values()) > 0
    for row, callers in zip(ranked["rows"], (1, 4), strict=True):
        assert row["concurrency"] == callers and row["by_model"] > 0.5 and row["speedup"] > 0 and row["over_goal"] > 0
        goal = row[THREADS]["cpu_ms_per_reply"] + 1.2 * best
        assert row["goal_cpu_ms_per_reply"] == pytest.approx(goal, rel=0.01)


def ask(contestant: Contestant, request: bytes) -> bytes:
    with contestant.awake():
        reply = contestant.rank(request)
    assert isinstance(reply, bytes)
    return reply


def test_all_servers_answer_valid_replies_of_the_same_size(servers: dict[str, Contestant]) -> None:
    requests = rank_requests(3)
    replies = {name: ask(contestant, as_bytes(requests)[2]) for name, contestant in servers.items()}
    assert set(replies) == {
        OURS, BEHIND_EDGES, CONSTANT, THREADS, TEXTBOOK, TEXTBOOK_LEAN, OURS_RANKED, TEXTBOOK_RANKED,
    }  # fmt: skip
    assert ranking_pb2.RankResponse.FromString(replies[OURS_RANKED]).model_version == "trendiness/1+ranker/1"
    for name, payload in replies.items():
        reply = ranking_pb2.RankResponse.FromString(payload)
        ids = [s.stream_id for s in reply.streams]
        assert len(ids) == len(set(ids)) == 50, name
        assert all(s.verify_by_ms > reply.as_of_ms > 0 and np.isfinite(s.score) for s in reply.streams), name
        assert list(reply.source_names), name
        # Generated classes leave out fields that are zero, such as exploration; ours writes all of them.
        assert len(payload) == pytest.approx(len(replies[OURS]), rel=0.005 if name in (CONSTANT, THREADS) else 0.11), (
            name
        )
        if name not in (CONSTANT, THREADS):
            assert reply.request_id == requests[2].request_id


def test_both_rankers_obey_a_filter(servers: dict[str, Contestant]) -> None:
    request = rank_requests(1)[0]
    wanted = LANGUAGES.index(request.languages[0])
    for name in (OURS, TEXTBOOK, TEXTBOOK_LEAN, OURS_RANKED, TEXTBOOK_RANKED):
        reply = ranking_pb2.RankResponse.FromString(ask(servers[name], request.SerializeToString()))
        numbers = [int(s.stream_id.removeprefix("stream-")) for s in reply.streams]
        assert len(numbers) == 50 and {n % len(LANGUAGES) for n in numbers} == {wanted}, name


@pytest.mark.parametrize("lean", [True, False])
def test_the_textbook_server_orders_by_utility_and_caps_creators(lean: bool) -> None:
    textbook = Textbook(STREAMS, lean)
    textbook._creator = np.arange(STREAMS, dtype=np.int32) // 6  # 50 creators of 6
    request = rank_requests(2)[1]
    reply = asyncio.run(textbook.Rank(request, None))  # type: ignore[arg-type]
    numbers = np.array([int(s.stream_id.removeprefix("stream-")) for s in reply.streams])
    assert len(set(numbers.tolist())) == 50 and np.bincount(numbers // 6).max() == 2
    scores = [s.score for s in reply.streams]
    assert scores[0] == max(scores)
    assert (sorted(scores, reverse=True) == scores) == lean
    assert sum(s.exploration > 0 for s in reply.streams) == (0 if lean else 4)


def test_the_textbook_server_shows_nothing_that_is_over_and_fills_the_gap() -> None:
    textbook = Textbook(STREAMS, lean=False)
    request = rank_requests(2)[1]
    first = asyncio.run(textbook.Rank(request, None)).streams[0].stream_id  # type: ignore[arg-type]
    textbook._lease_expires_ms[int(first.removeprefix("stream-"))] = 0
    reply = asyncio.run(textbook.Rank(request, None))  # type: ignore[arg-type]
    assert len(reply.streams) == 50 and first not in {s.stream_id for s in reply.streams}


class Buyers:
    """Takes the place of the ranker: everybody buys, for certain."""

    def run(self, outputs: list[str], asked: dict[str, np.ndarray[Any, Any]]) -> list[np.ndarray[Any, Any]]:
        assert outputs == ["heads"] and len(asked["stream_features"]) <= RANKED
        return [np.tile(np.array([0, 0, 1, 0], np.float32), (len(asked["viewer_of"]), 1))]


def test_the_textbook_servers_ranker_counts_as_ours_does_by_default() -> None:
    surface = RuleBook.load(RankSettings().rules_file, FEATURES.names).surfaces["default"]
    weights = (surface.click_weight, surface.watch_weight, surface.purchase_weight, -surface.report_weight)
    assert HEAD_WEIGHTS.tolist() == list(weights) and RankerSettings().candidates == RANKED
    ranked, plain = Textbook(STREAMS, lean=False, ranker=True), Textbook(STREAMS, lean=False)
    ranked._ranker = Buyers()
    request = rank_requests(2)[1]
    scores: list[dict[str, float]] = []
    for textbook in (ranked, plain):
        reply = asyncio.run(textbook.Rank(request, None))  # type: ignore[arg-type]
        scores.append({stream.stream_id: stream.score for stream in reply.streams})
    both = scores[0].keys() & scores[1].keys()
    added = {name: round(scores[0][name] - scores[1][name], 3) for name in both}
    assert both and set(added.values()) <= {0.0, 2.0} and list(added.values()).count(2.0) > len(both) / 2


def test_what_is_not_given_on_the_command_line_is_as_planned() -> None:
    assert plan_from(None, None, None, quick=False) == DEFAULT
    assert plan_from(None, None, None, quick=True) == QUICK
    assert DEFAULT.headline == (10_000, 64)
    assert plan_from([500], [2, 8], 0.5, quick=True).headline == (500, 8)
