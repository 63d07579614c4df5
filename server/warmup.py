"""Warm-up: compiles every kernel and asks the model once, before the server says SERVING."""

from __future__ import annotations

import time

from liverank.v1 import ranking_pb2 as pb

from server.engine import Engine
from server.rpc.decode import decode_rank

MODEL_WAIT_S = 5.0


def warm_up(engine: Engine) -> None:
    """Ranks with and without an embedding on what the table holds, and waits for the first scores.

    A model that does not answer does not keep the server from serving: replies disclose the fallback.
    """
    dim = engine.settings.table.embedding_dim
    surfaces = engine.streams.book.surfaces
    for request in (pb.RankRequest(), pb.RankRequest(viewer_embedding=[1.0] * dim, languages=["en"])):
        query = decode_rank(request, engine.settings, surfaces, time.monotonic() + 120.0)
        engine.rank([query]).result()
    engine.first_scores.wait(MODEL_WAIT_S)
