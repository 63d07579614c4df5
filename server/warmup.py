"""Warm-up: before the server says SERVING, every kernel is compiled and the model was asked once.

A kernel compiles on its first call, which takes seconds on a machine that has never run it. So a small
private world goes the whole way first: every kind of event, a tick, every path of ranking.
"""

from __future__ import annotations

import logging
import time
from functools import partial

import numpy as np
from liverank.v1 import ingest_pb2 as pb

from kernels.backend import CPU, Backend
from kernels.event_arrow import COLUMNS, N_DESCRIBED, decode_columns, text_bytes
from kernels.event_rows import pack_names
from kernels.exposures import count_exposures
from kernels.idmap import hash_ids, pack_ids
from kernels.ranker_rows import StreamRows, add_heads, best_of_rows, gather_streams
from kernels.rings import lay_messages
from kernels.unit import to_unit
from server.clock import ManualClock
from server.config import Settings
from server.engine import Engine
from server.live.event_checks import KIND_NAMES, KINDS
from server.live.events import decode_batch, packed_currencies
from server.live.features import FeatureSet
from server.ranking.explain import explain
from server.ranking.replies import Replies
from server.ranking.slates import ReplyState
from server.retrieval.query import RankQuery, build_batch
from server.retrieval.registry import GPU_ENGINE_NAMES, make_engine, resolve_engine
from server.retrieval.view import Snapshot
from server.rpc.encode import encode_replies
from server.rules.rulebook import RuleBook
from server.scoring.ladder import Level
from server.scoring.ranker import RankerCaller
from server.scoring.ranker_schema import CODES, HEADS, empty_inputs
from server.viewers.table import ViewerTable
from server.world import build_world

logger = logging.getLogger(__name__)

MODEL_WAIT_S = 5.0
STREAMS = 40


def warm_up(engine: Engine, backend: Backend = CPU) -> None:
    """Compiles what serving needs, then waits for the engine's first scores.

    A model that does not answer does not keep the server from serving: replies disclose the fallback.
    """
    started_s = time.monotonic()
    compiled = partial(compile_kernels, engine.settings, engine.features, engine.streams.book, backend)
    if resolve_engine(engine.settings.retrieval.engine, backend) in GPU_ENGINE_NAMES:
        engine.call(compiled).result()  # the device has one owner, the engine thread
    else:
        compiled()  # beside the engine, which goes on expiring leases
    engine.call(engine.pipeline.prepare).result()
    engine.answerer.first_scores.wait(MODEL_WAIT_S)
    logger.info("warm after %.1f s", time.monotonic() - started_s)


def warm_ranker(ranker: RankerCaller, settings: Settings, n_features: int) -> None:
    """Has the ranker loaded and asked once; one that does not answer costs replies that say so, and no start."""
    rows = empty_inputs(settings.ranker.candidates, n_features, settings.table.embedding_dim)
    if problem := ranker.warm(rows, settings.ranker.warm_ms / 1000):
        logger.error("%s does not answer yet: %s", settings.ranker.model, problem)


def compile_kernels(settings: Settings, features: FeatureSet, book: RuleBook, backend: Backend = CPU) -> None:
    """Takes a private table of a few streams through events, tick, ranking, explanation and encoding."""
    sizes = {"capacity": 2 * STREAMS, "max_events_per_batch": 2 * STREAMS}
    viewers = settings.viewers.model_copy(
        update={"capacity": min(settings.viewers.capacity, 8), "sessions": 2 * STREAMS}
    )
    small = settings.model_copy(update={"table": settings.table.model_copy(update=sizes), "viewers": viewers})
    now_ms = 1_700_000_000_000
    clock = ManualClock(now_ms)
    name = resolve_engine(settings.retrieval.engine, backend)
    search = make_engine(name, 2 * STREAMS, settings.table.embedding_dim, backend, settings.retrieval.scan)
    world = build_world(small, clock, features, book, backend, search)
    table, streams, pipeline = world.table, world.streams, world.pipeline
    for payload in _events(now_ms, settings.table.embedding_dim):
        applied = table.apply(decode_batch(payload, small.table).events, now_ms)
        streams.forget_changed_sessions(applied.touched)
    _compile_columns(small)
    table.expire(now_ms)
    rows = np.arange(table.rows, dtype=np.int32)
    streams.assess(rows, now_ms)
    streams.apply_moderation(rows, now_ms)
    pipeline.snapshot = Snapshot(table, streams, settings.retrieval, now_ms, rows[::-1].copy())
    if isinstance(table.follower, ViewerTable):
        table.follower.histories(hash_ids(*pack_ids([b"v", b""])), now_ms)
    state = ReplyState(1, "warm-up", Level.NONE, (), 0)
    for batch_of in (_queries(settings, 1), _queries(settings, 9)):
        batch = build_batch(batch_of, table, book)
        for slates in (pipeline.rank(batch), pipeline.popular(batch)):
            count_exposures(streams.exposures, slates.slots)
            _into_a_ring(encode_replies(slates, state, table, 0.0))
    if settings.ranker.model:
        _compile_ranker_rows(settings, len(features))
    explain(table, streams, features, pipeline, _queries(settings, 1)[0], "s1", 0)
    to_unit(np.ones(settings.table.embedding_dim, np.float32))  # of the first request that brings an embedding


def _compile_ranker_rows(settings: Settings, n_features: int) -> None:
    """What the ranker is asked, and what it adds."""
    utility, slots = np.zeros((1, 2), np.float32), np.zeros((1, 2), np.int32)
    rows, columns = best_of_rows(utility, slots, np.ones(1, np.bool_), 1)
    values, states = np.zeros((1, n_features), np.float32), np.zeros((1, n_features), np.uint8)
    embedding = np.zeros((1, settings.table.embedding_dim), np.float32)
    gather_streams(slots[0], StreamRows(values, states, embedding, np.zeros((1, len(CODES)), np.int64)))
    heads = np.zeros((len(rows), len(HEADS)), np.float32)
    add_heads(utility, rows, columns, heads, np.zeros((1, len(HEADS)), np.float32))


def _into_a_ring(replies: Replies) -> None:
    """As for an edge."""
    which, heads = np.arange(len(replies)), np.zeros((len(replies), 1), np.uint8)
    common = np.frombuffer(replies.common, np.uint8)
    lay_messages(np.zeros(8, np.uint8), 0, 0, heads, common, replies.streams, replies.offsets, which)


def _compile_columns(settings: Settings) -> None:
    """What reads columnar batches; without the library that they come with, which a server may never need."""
    words, columns = np.zeros(1, np.int64), np.zeros((len(COLUMNS), N_DESCRIBED), np.int64)
    decode_columns(words, columns, 0, pack_names(KINDS), packed_currencies(settings.table.currencies))
    text_bytes(words, columns[0], 0)


def _events(now_ms: int, dim: int) -> list[bytes]:
    """Starts, then one event of every kind, as serialised batches."""
    starts, others = [], []
    for i in range(STREAMS):
        start = pb.Event(sequence=i + 1, stream_id=f"s{i}", epoch=1, event_time_ms=now_ms)
        start.started.creator_id = f"c{i % 7}"
        start.started.category, start.started.language = f"g{i % 3}", f"l{i % 2}"
        start.started.embedding.extend(np.cos(np.arange(dim) + i).tolist())
        starts.append(start)
    for i, case in enumerate(KIND_NAMES.values()):
        if case != "started":
            event = pb.Event(sequence=100 + i, stream_id=f"s{i}", epoch=1, event_time_ms=now_ms, viewer_id="v")
            getattr(event, case).SetInParent()
            others.append(event)
    return [pb.EventBatch(producer_id="warm-up", events=e).SerializeToString() for e in (starts, others)]


def _queries(settings: Settings, n: int) -> list[RankQuery]:
    """n requests, with and without embedding, filters, followed creators and exclusions."""
    dim = settings.table.embedding_dim
    return [
        RankQuery(
            request_id=f"r{i}",
            viewer_id="v",
            embedding=None if i % 3 == 2 else np.full(dim, dim**-0.5, np.float32),
            surface="default",
            limit=10,
            limit_clamped=False,
            languages=("l1",) if i % 2 else (),
            categories=(),
            region="",
            followed_creator_ids=("c1",),
            exclude_stream_ids=("s1",) if i else (),
            min_offset=0,
            deadline_s=float("inf"),
            received_s=0.0,
        )
        for i in range(n)
    ]
