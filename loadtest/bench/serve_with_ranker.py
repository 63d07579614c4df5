"""The second mode of `bench serve`: a model viewer x stream is asked for every request, by everybody the same.

What can be aimed at is the transport and the model, and next to nothing beside them: a reply from grpcio's own
constant server plus 1.2 times what the model costs where it costs least, alone in a loop, over several sizes of a call.
``over_goal`` is ours divided by that, in CPU per reply. ``by_model`` says how many of our replies the model had a part
in: one that was not answered in time costs less, and must not count as a saving.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from contextlib import closing
from statistics import median
from typing import Any

import numpy as np

from loadtest.bench.catalogue import DIM, make_catalogue
from loadtest.bench.contestants import (
    CALL_TIMEOUT_S,
    OLDEST_MS,
    OURS_RANKED,
    RANKER,
    TEXTBOOK_RANKED,
    THREADS,
    Contestant,
)
from loadtest.bench.inprocess import NOW_MS, fill_in_process
from loadtest.bench.load import Ask
from loadtest.bench.textbook import RANKED
from loadtest.bench.turns import Turn, cpu_ratio, summary, take_turn
from server.config import RankerSettings
from server.live.features import FeatureSet
from server.ranking.ranker import RankerStage
from server.scoring.ranker import RankerCaller
from server.scoring.ranker_local import LocalRanker
from server.scoring.ranker_schema import RankerInputs

NAMES = (OURS_RANKED, THREADS, TEXTBOOK_RANKED)
VIEWERS_PER_CALL = (1, 2, 4, 8, 16, 32)
OF_THE_MODEL = 1.2
"""What the goal allows the server to spend on the model, relative to the least that it costs."""
_AT_LEAST_S = 0.1
"""Of CPU time, per size of a call and round."""
_BY_MODEL = b"+" + RANKER.encode() + b"/"


class ModelAlone:
    """The model in this process, and calls as the server makes them, of several sizes."""

    def __init__(self, streams: int) -> None:
        world = fill_in_process(make_catalogue(streams, OLDEST_MS))
        features = FeatureSet.load(world.settings.table.features_file)
        repository = world.settings.scoring.model_repository
        self._model = LocalRanker(repository, RANKER, features.schema, len(features), DIM)
        self._calls: dict[int, RankerInputs] = {}
        with closing(RankerCaller(self._model, RankerSettings(), world.clock)) as nobody_asked:
            stage = RankerStage(nobody_asked, world.table, world.streams, RANKED)
            world.streams.assess(np.arange(world.table.rows, dtype=np.int32), NOW_MS)
            for viewers in VIEWERS_PER_CALL:
                batch = world.batch(viewers)
                candidates = world.pipeline.rank(batch).candidates
                assert candidates is not None
                rows, columns = stage.chosen(batch, candidates)
                self._calls[viewers] = stage.inputs(batch, candidates.slots[rows, columns], rows, NOW_MS)

    def cpu_ms(self, viewers: int) -> float:
        """CPU time per viewer of calls for so many, ms."""
        call, calls = self._calls[viewers], 0
        self._model.heads(call, CALL_TIMEOUT_S)
        began_s = time.process_time()
        while (used_s := time.process_time() - began_s) < _AT_LEAST_S:
            self._model.heads(call, CALL_TIMEOUT_S)
            calls += 1
        return used_s * 1000 / (calls * viewers)


def with_ranker(
    servers: dict[str, Contestant],
    requests: list[bytes],
    streams: int,
    concurrency: Sequence[int],
    rounds: int,
    seconds: float,
) -> dict[str, Any]:
    """Ours, the textbook server, the transport and the model alone, taking turns at each number of callers."""
    alone = ModelAlone(streams)
    model: dict[int, list[float]] = {viewers: [] for viewers in VIEWERS_PER_CALL}
    turns: dict[int, dict[str, list[Turn]]] = {c: {name: [] for name in NAMES} for c in concurrency}
    by_model: dict[int, list[bool]] = {c: [] for c in concurrency}
    for _ in range(rounds):
        for viewers, seen in model.items():
            seen.append(alone.cpu_ms(viewers))
        for callers, of in turns.items():
            for name in NAMES:
                ask = servers[name].rank
                if name == OURS_RANKED:
                    ask = _counted(ask, by_model[callers])
                of[name].append(take_turn(servers[name], ask, requests, callers, seconds))
    model_ms = {viewers: median(seen) for viewers, seen in model.items()}
    best = min(model_ms, key=lambda viewers: model_ms[viewers])
    rows = [_row(callers, of, model_ms[best], by_model[callers]) for callers, of in turns.items()]
    return {
        "streams": streams,
        "candidates": RANKED,
        "model_cpu_ms_per_viewer": {str(viewers): round(ms, 4) for viewers, ms in model_ms.items()},
        "best_viewers_per_call": best,
        "rows": rows,
        "errors": sum(sum(row[name]["errors"].values()) for row in rows for name in NAMES),
    }


def _counted(ask: Ask, by_model: list[bool]) -> Ask:
    """The same, and notes of each reply whether the model had a part in it."""

    def asked(request: bytes) -> object:
        reply = ask(request)
        assert isinstance(reply, bytes)
        by_model.append(_BY_MODEL in reply)
        return reply

    return asked


def _row(callers: int, of: dict[str, list[Turn]], model_ms: float, by_model: list[bool]) -> dict[str, Any]:
    goals = [transport.cpu_ms + OF_THE_MODEL * model_ms for transport in of[THREADS]]
    return {
        "concurrency": callers,
        **{name: summary(turns) for name, turns in of.items()},
        "by_model": round(sum(by_model) / len(by_model), 4),
        "goal_cpu_ms_per_reply": round(median(goals), 4),
        "over_goal": round(median(ours.cpu_ms / goal for ours, goal in zip(of[OURS_RANKED], goals, strict=True)), 3),
        "speedup": cpu_ratio(of[TEXTBOOK_RANKED], of[OURS_RANKED]),
    }
