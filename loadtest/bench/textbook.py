"""What one would build instead: the same pipeline from grpc.aio, FAISS, onnxruntime and NumPy, one request at a time.

Written as a competent engineer would: arrays ready at start, what depends on the filter only computed once, one thread
per library, the model run where it is needed without crossing threads (a hop costs more CPU than it hides), replies
through the generated classes.

It does for a request what liverank does: personal candidates of the eligible, trending ones overall and per category
and language, fresh ones; scores, blend, caps per creator and category, MMR, exploration, a last check with back-fill
from a reserve. It does none of what liverank does beside that: no events, no ticks, no features computed (they stand
ready), nothing that expires. ``--lean``: less, namely 500 personal candidates in order of utility and the creator cap.
``--ranker``: the model viewer x stream for the best candidates of each request, as liverank asks it; what streams trend
is then worked out once, at start.
"""

from __future__ import annotations

import argparse
import asyncio
import signal
import time
from dataclasses import dataclass
from pathlib import Path

import faiss
import grpc
import numpy as np
import onnxruntime
from liverank.v1 import ranking_pb2 as pb
from liverank.v1 import ranking_pb2_grpc as pb_grpc
from numpy.typing import NDArray

from loadtest.bench.catalogue import CATEGORIES, LANGUAGES, LIMIT, make_catalogue, stream_id
from loadtest.bench.child import announce
from loadtest.processes import ROOT
from server.scoring.ranker_schema import CODE_BUCKETS, NEUTRAL_POSITION, SEQUENCE, SEQUENCE_META, bucket_of

MODELS = ROOT / "model_repository"
LEAN_CANDIDATES = 500
PERSONAL, TRENDING, PER_GROUP, FRESH = 200, 200, 20, 50
"""Candidates per source: our defaults."""
CREATOR_CAP, CATEGORY_SHARE, EXPLORE, RESERVE = 2, 0.5, 4, 20
TREND_WEIGHT, SIMILARITY_WEIGHT = 1.0, 0.5
RANKED = 200
HEAD_WEIGHTS = np.array([0.5, 1.0, 2.0, -5.0], np.float32)
"""Ours by default: candidates that the ranker is asked about, and what its heads weigh."""
DIVERSITY = 0.15
MMR_CANDIDATES = 200
FRESH_BIT, CATEGORY_BIT, LANGUAGE_BIT, TRENDING_BIT = 32, 4, 8, 2
SOURCE_NAMES = ("personal", "trending", "trending_in_category", "trending_in_language", "followed", "fresh")
"""Ours, so that replies are of the same size."""
LEASE_MS = 36_000_000


@dataclass(frozen=True)
class View:
    """What one filter sees. rows int64[m]: candidates that do not depend on the viewer, ``sources`` uint32[m] of them;
    listed bool[N]: which those are."""

    selector: faiss.SearchParameters
    rows: NDArray[np.int64]
    sources: NDArray[np.uint32]
    listed: NDArray[np.bool_]
    vectors: NDArray[np.float32]


class Textbook(pb_grpc.RankingServicer):
    """N streams that never change."""

    def __init__(self, streams: int, lean: bool, ranker: bool = False, seed: int = 0) -> None:
        faiss.omp_set_num_threads(1)
        catalogue = make_catalogue(streams, seed=seed)
        self._embedding = catalogue.embedding / np.linalg.norm(catalogue.embedding, axis=1, keepdims=True)
        self._index = faiss.IndexFlatIP(self._embedding.shape[1])
        self._index.add(self._embedding)
        self._ids = [stream_id(i) for i in range(streams)]
        self._creator, self._category, self._language = catalogue.creator, catalogue.category, catalogue.language
        self._lean = lean
        self._live = np.ones(streams, np.bool_)
        self._lease_expires_ms = np.full(streams, int(time.time() * 1000) + LEASE_MS)
        self._model = one_thread("trendiness")
        width = self._model.get_inputs()[0].shape[1]
        rng = np.random.default_rng(seed)
        self._features = rng.lognormal(1.0, 1.5, (streams, width)).astype(np.float32)
        self._trend = self._model.run(["trend"], {"features": self._features})[0]
        self._by_trend = np.argsort(-self._trend)
        self._ranker = one_thread("ranker") if ranker else None
        names = (
            [LANGUAGES[i] for i in self._language.tolist()],
            [CATEGORIES[i] for i in self._category.tolist()],
            [f"creator-{i}" for i in self._creator.tolist()],
        )
        self._codes = np.stack([bucket_of(*pair) for pair in zip(names, CODE_BUCKETS, strict=True)], axis=1)
        self._fresh = rng.permutation(streams)[: max(FRESH, streams // 12)]
        self._rng = rng
        self._views: dict[tuple[str, ...], View] = {}

    async def Rank(self, request: pb.RankRequest, context: grpc.aio.ServicerContext) -> pb.RankResponse:  # noqa: N802
        """retrieve → score → blend → select → check → reply, for one viewer."""
        begun_s = time.perf_counter()
        query = np.array(request.viewer_embedding, np.float32)
        query /= np.linalg.norm(query)
        view = self._view(tuple(request.languages))
        rows, sources, similarity = self._personal(query, view) if self._lean else self._candidates(query, view)
        retrieved_s = time.perf_counter()
        if self._ranker is None:
            trend = self._model.run(["trend"], {"features": self._features[rows]})[0]
        else:
            trend = self._trend[rows]
        utility = TREND_WEIGHT * trend + SIMILARITY_WEIGHT * np.maximum(similarity, 0)
        if self._ranker is not None:
            best = np.argpartition(utility, -RANKED)[-RANKED:] if len(rows) > RANKED else np.arange(len(rows))
            utility[best] += self._heads(self._ranker, query, rows[best]) @ HEAD_WEIGHTS
        blended_s = time.perf_counter()
        limit = request.limit or LIMIT
        if self._lean:
            chosen, chances = self._best(rows, utility, limit), dict[int, float]()
        else:
            chosen, chances = self._diverse(rows, sources, utility, limit)
        shown = self._still_live(rows[chosen], limit)
        timings = pb.Timings(
            retrieve_us=int((retrieved_s - begun_s) * 1e6),
            blend_us=int((blended_s - retrieved_s) * 1e6),
            select_us=int((time.perf_counter() - blended_s) * 1e6),
            batch_rows=1,
        )
        places = [chosen[i] for i in shown]
        return self._reply(
            request.request_id, rows[places].tolist(), utility[places].tolist(), sources[places].tolist(),
            [chances.get(i, 0.0) for i in places], timings,
        )  # fmt: skip

    def _view(self, languages: tuple[str, ...]) -> View:
        """The filter's part, computed on first use and kept."""
        view = self._views.get(languages)
        if view is None:
            eligible = self._live
            if languages:
                wanted = [LANGUAGES.index(name) for name in languages if name in LANGUAGES]
                eligible = eligible & np.isin(self._language, wanted)
            order = self._by_trend[eligible[self._by_trend]]
            fresh = self._fresh[eligible[self._fresh]]
            groups = [(CATEGORY_BIT, self._category), (LANGUAGE_BIT, self._language)]
            listed = [(order[:TRENDING], TRENDING_BIT), (fresh[:FRESH], FRESH_BIT)]
            listed += [
                (order[column[order] == value][:PER_GROUP], bit)
                for bit, column in groups
                for value in np.unique(column)
            ]
            sources = np.zeros(len(eligible), np.uint32)
            for rows, bit in listed:
                sources[rows] |= np.uint32(bit)
            rows = np.flatnonzero(sources)
            # FAISS's stub does not know the Python side of these two constructors.
            bitmap = faiss.IDSelectorBitmap(np.packbits(eligible, bitorder="little"))  # type: ignore[call-arg, arg-type]
            selector = faiss.SearchParameters(sel=bitmap)  # type: ignore[call-arg]
            view = View(selector, rows, sources[rows], sources > 0, self._embedding[rows])
            self._views[languages] = view
        return view

    def _personal(
        self, query: NDArray[np.float32], view: View
    ) -> tuple[NDArray[np.int64], NDArray[np.uint32], NDArray[np.float32]]:
        """Eligible streams closest to query float32[D]: rows int64[k], sources, cosines float32[k], best first."""
        wanted = min(LEAN_CANDIDATES if self._lean else PERSONAL, len(self._ids))
        similarity, rows = self._index.search(query[None, :], wanted, params=view.selector)
        found = int(np.count_nonzero(rows[0] >= 0))  # -1 stands at the end, where too few were eligible
        return rows[0, :found], np.ones(found, np.uint32), similarity[0, :found]

    def _candidates(
        self, query: NDArray[np.float32], view: View
    ) -> tuple[NDArray[np.int64], NDArray[np.uint32], NDArray[np.float32]]:
        """The same of all sources, each stream once."""
        near, _, similarity = self._personal(query, view)
        new = ~view.listed[near]
        sources = view.sources | np.isin(view.rows, near[~new]).astype(np.uint32)
        return (
            np.concatenate((view.rows, near[new])),
            np.concatenate((sources, np.ones(int(new.sum()), np.uint32))),
            np.concatenate((view.vectors @ query, similarity[new])),
        )

    def _heads(
        self, ranker: onnxruntime.InferenceSession, query: NDArray[np.float32], rows: NDArray[np.int64]
    ) -> NDArray[np.float32]:
        """float32[k, 4]: chances of click, watch, purchase, report of streams ``rows`` for a viewer without a past."""
        n = len(rows)
        asked = {
            "stream_features": self._features[rows],
            "stream_missing": np.zeros((n, self._features.shape[1]), np.float32),
            "stream_embedding": self._embedding[rows],
            "codes": self._codes[rows],
            "position": np.full((n, 1), NEUTRAL_POSITION, np.float32),
            "viewer_of": np.zeros(n, np.int64),
            "viewer_embedding": query[None, :],
            "sequence_embedding": np.zeros((1, SEQUENCE, len(query)), np.float32),
            "sequence_meta": np.zeros((1, SEQUENCE, len(SEQUENCE_META)), np.float32),
        }
        heads: NDArray[np.float32] = ranker.run(["heads"], asked)[0]
        return heads

    def _best(self, rows: NDArray[np.int64], utility: NDArray[np.float32], limit: int) -> list[int]:
        """Indices of candidates, best first, at most CREATOR_CAP per creator."""
        order = np.argsort(-utility)
        chosen: list[int] = []
        places: dict[int, int] = {}
        for i, creator in zip(order.tolist(), self._creator[rows[order]].tolist(), strict=True):
            taken = places.get(creator, 0)
            if taken < CREATOR_CAP:
                places[creator] = taken + 1
                chosen.append(i)
                if len(chosen) == limit:
                    break
        return chosen

    def _diverse(
        self, rows: NDArray[np.int64], sources: NDArray[np.uint32], utility: NDArray[np.float32], limit: int
    ) -> tuple[list[int], dict[int, float]]:
        """Slate and reserve by maximal marginal relevance among the best MMR_CANDIDATES, around fresh streams drawn
        first; and with what probability those were drawn."""
        pool = np.argsort(-utility)[:MMR_CANDIDATES]
        vectors, worth = self._embedding[rows[pool]], utility[pool]
        groups = (
            (self._creator[rows], dict[int, int](), CREATOR_CAP),
            (self._category[rows], dict[int, int](), int(CATEGORY_SHARE * limit)),
        )  # fmt: skip
        young = np.flatnonzero(sources & FRESH_BIT)
        drawn = self._rng.choice(young, min(EXPLORE, len(young)), replace=False).tolist()
        worth[np.isin(pool, drawn)] = -np.inf
        closest = np.max(vectors @ self._embedding[rows[drawn]].T, axis=1, initial=0.0)

        def take(i: int) -> None:
            for column, taken, cap in groups:
                value = int(column[i])
                taken[value] = taken.get(value, 0) + 1
                if taken[value] == cap:
                    worth[column[pool] == value] = -np.inf

        for i in drawn:
            take(i)
        chosen: list[int] = []
        for _ in range(min(limit - len(drawn) + RESERVE, len(pool))):
            p = int(np.argmax(worth - DIVERSITY * closest))
            if worth[p] == -np.inf:
                break
            np.maximum(closest, vectors @ vectors[p], out=closest)
            worth[p] = -np.inf
            chosen.append(int(pool[p]))
            take(chosen[-1])
        for j, i in enumerate(drawn):
            chosen.insert((j + 1) * limit // (len(drawn) + 1), i)
        return chosen, dict.fromkeys(drawn, len(drawn) / max(1, len(young)))

    def _still_live(self, rows: NDArray[np.int64], limit: int) -> list[int]:
        """The last check: places of those that may be shown now, at most ``limit``."""
        now_ms = int(time.time() * 1000)
        return np.flatnonzero(self._live[rows] & (self._lease_expires_ms[rows] > now_ms))[:limit].tolist()

    def _reply(
        self,
        request_id: str,
        rows: list[int],
        scores: list[float],
        sources: list[int],
        chances: list[float],
        timings: pb.Timings,
    ) -> pb.RankResponse:
        now_ms = int(time.time() * 1000)
        reply = pb.RankResponse(
            request_id=request_id,
            as_of_ms=now_ms,
            model_version="trendiness/1",
            degradation=pb.Degradation(),
            timings=timings,
            source_names=SOURCE_NAMES,
        )
        add, ids, verify_by_ms = reply.streams.add, self._ids, now_ms + LEASE_MS
        for row, score, bits, chance in zip(rows, scores, sources, chances, strict=True):
            # add() with keywords is the quickest way measured
            add(stream_id=ids[row], score=score, epoch=1, verify_by_ms=verify_by_ms, sources=bits, exploration=chance)
        return reply


def one_thread(name: str) -> onnxruntime.InferenceSession:
    """Version 1 of a model of the repository."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    return onnxruntime.InferenceSession(
        str(MODELS / name / "1" / "model.onnx"), options, providers=["CPUExecutionProvider"]
    )


async def serve(streams: int, lean: bool, ranker: bool, port_file: Path) -> None:
    """Serves until SIGTERM."""
    stop = asyncio.Event()
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, stop.set)
    server = grpc.aio.server(options=[("grpc.so_reuseport", 0)])
    pb_grpc.add_RankingServicer_to_server(Textbook(streams, lean, ranker), server)
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    announce(port_file, port)
    await stop.wait()
    await server.stop(grace=1.0)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--streams", type=int, required=True)
    parser.add_argument("--lean", action="store_true", help="fewer sources, no MMR, no exploration")
    parser.add_argument("--ranker", action="store_true", help="with the model viewer x stream")
    parser.add_argument("--port-file", type=Path, required=True, help="written with the bound port once serving")
    given = parser.parse_args()
    asyncio.run(serve(given.streams, given.lean, given.ranker, given.port_file))
