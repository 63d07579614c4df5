"""The ranker on a real Triton: same heads as in process, and a Triton that dies under a server."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from liverank.v1 import ranking_pb2

from server.errors import SchemaMismatch, ScorerTimeout, ScorerUnavailable
from server.scoring.ranker_local import LocalRanker
from server.scoring.ranker_triton import TritonRanker
from tests import rankers
from tests import triton_server as ts
from tests.app import FEATURES, SMALL, put_current_model, running_app
from tests.events import T0, started
from tests.unit.test_ranker_calls import SCHEMA, D, F, random_inputs


def test_triton_and_the_process_answer_the_same_whatever_the_shape_of_a_call(tmp_path: Path) -> None:
    repository = tmp_path / "repository"
    rankers.put_ranker(repository, rankers.telling(F, D), SCHEMA, F, D)
    rankers.put_ranker(repository, rankers.endless(F, D), SCHEMA, F, D, name="slow")
    local = LocalRanker(repository, "ranker", SCHEMA, F, D)
    with ts.running_triton(repository, tmp_path / "triton.log", "ranker", "slow") as triton:
        ranker = TritonRanker(triton.address, "ranker", SCHEMA, F, D)
        for rows, viewers in ((7, 3), (1, 1), (3, 3), (2_000, 64)):
            inputs = random_inputs(rows, viewers)
            found = ranker.heads(inputs, 10.0)
            assert found.model_version == "ranker/1"
            np.testing.assert_allclose(found.values, local.heads(inputs, 10.0).values, atol=1e-6)
        with pytest.raises(SchemaMismatch, match="'another'"):
            TritonRanker(triton.address, "ranker", "another", F, D).heads(random_inputs(), 5.0)
        with pytest.raises(ScorerUnavailable, match=r"NOT_FOUND|not found|UNAVAILABLE"):
            TritonRanker(triton.address, "absent", SCHEMA, F, D).heads(random_inputs(), 5.0)
        slow = TritonRanker(triton.address, "slow", SCHEMA, F, D)
        with pytest.raises(ScorerTimeout):
            slow.heads(random_inputs(), 0.2)
        slow.close()
        triton.kill()
        with pytest.raises(ScorerUnavailable):
            ranker.heads(random_inputs(), 5.0)
        ranker.close()


def test_a_server_whose_triton_dies_ranks_by_the_last_stream_scores_and_finds_a_new_triton(tmp_path: Path) -> None:
    repository, n, dim = tmp_path / "models", len(FEATURES), SMALL["embedding_dim"]
    put_current_model(repository)
    rankers.put_ranker(repository, rankers.telling(n, dim), FEATURES.schema, n, dim)
    log = tmp_path / "triton.log"
    with ts.running_triton(repository, log, "trendiness", "ranker") as triton:
        port = triton.port
        settings = {
            "scoring": {"mode": "triton", "triton_address": triton.address, "transport": "plain"},
            "ranker": {"model": "ranker", "deadline_ms": 5_000, "breaker_open_ms": 1},
        }
        with running_app(tmp_path, **settings) as client:
            client.publish(*(started(f"s{i}", 0) for i in range(6)))
            client.tick()

            def whole() -> ranking_pb2.RankResponse | None:
                reply = client.rank(limit=6)
                return reply if reply.model_version == "trendiness/1+ranker/1" else None

            before = ts.eventually(whole, 20.0)
            assert before.degradation.level == ranking_pb2.Degradation.NONE and before.as_of_ms == T0
            triton.kill()
            reply = client.rank(limit=6)
            assert len(reply.streams) == 6 and reply.degradation.level >= ranking_pb2.Degradation.LAST_GOOD
            assert any(reason.startswith("ranker: ") for reason in reply.degradation.reasons)
            with ts.running_triton(repository, log, "trendiness", "ranker", port=port):

                def back() -> bool:
                    client.app.engine.clock.advance(10_000)  # type: ignore[attr-defined]
                    client.publish(*(started(f"n{client._sequence + i}", 0, client.clock.now_ms()) for i in range(2)))
                    client.tick()
                    return whole() is not None

                ts.eventually(back, 30.0)
