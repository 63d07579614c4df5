"""What one would build instead: grpc.aio, FAISS and onnxruntime, one request at a time.

Written as a competent engineer would: arrays ready at start, one thread per library, the model run where it is
needed without crossing threads (a hop costs more CPU than it hides), replies through the generated classes.

It does less than liverank: no trending, fresh or followed candidates, no category cap, exploration or reserve,
no features computed (they stand ready), no last check. ``--diversity`` adds the one costly part, MMR.
"""

from __future__ import annotations

import argparse
import asyncio
import signal
import time
from pathlib import Path

import faiss
import grpc
import numpy as np
import onnxruntime
from liverank.v1 import ranking_pb2 as pb
from liverank.v1 import ranking_pb2_grpc as pb_grpc
from numpy.typing import NDArray

from loadtest.bench.catalogue import LANGUAGES, LIMIT, make_catalogue, stream_id
from loadtest.bench.child import announce
from loadtest.processes import ROOT

MODEL = ROOT / "model_repository" / "trendiness" / "1" / "model.onnx"
CANDIDATES = 500
CREATOR_CAP = 2
TREND_WEIGHT, SIMILARITY_WEIGHT = 1.0, 0.5
MMR_CANDIDATES = 200
SOURCE_NAMES = ("personal", "trending", "trending_in_category", "trending_in_language", "followed", "fresh")
"""Ours, so that replies are of the same size."""
LEASE_MS = 36_000_000


class Textbook(pb_grpc.RankingServicer):
    """N streams that never change. ``diversity``: utility lost per unit of cosine, 0: plain order."""

    def __init__(self, streams: int, diversity: float, seed: int = 0) -> None:
        faiss.omp_set_num_threads(1)
        catalogue = make_catalogue(streams, seed=seed)
        self._embedding = catalogue.embedding / np.linalg.norm(catalogue.embedding, axis=1, keepdims=True)
        self._index = faiss.IndexFlatIP(self._embedding.shape[1])
        self._index.add(self._embedding)
        self._ids = [stream_id(i) for i in range(streams)]
        self._creator, self._diversity = catalogue.creator, diversity
        self._live = np.ones(streams, np.bool_)
        self._of_language = {name: catalogue.language == i for i, name in enumerate(LANGUAGES)}
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = options.inter_op_num_threads = 1
        self._model = onnxruntime.InferenceSession(str(MODEL), options, providers=["CPUExecutionProvider"])
        width = self._model.get_inputs()[0].shape[1]
        self._features = np.random.default_rng(seed).lognormal(1.0, 1.5, (streams, width)).astype(np.float32)
        self._rows = np.empty((CANDIDATES, width), np.float32)

    async def Rank(self, request: pb.RankRequest, context: grpc.aio.ServicerContext) -> pb.RankResponse:  # noqa: N802
        """retrieve → score → blend → order and cap → reply, for one viewer."""
        begun_s = time.perf_counter()
        query = np.array(request.viewer_embedding, np.float32)[None, :]
        query /= np.linalg.norm(query)
        candidates, similarity = self._retrieve(query, request.languages)
        retrieved_s = time.perf_counter()
        rows = np.take(self._features, candidates, axis=0, out=self._rows[: len(candidates)])
        trend = self._model.run(["trend"], {"features": rows})[0]
        utility = TREND_WEIGHT * trend + SIMILARITY_WEIGHT * np.maximum(similarity, 0)
        blended_s = time.perf_counter()
        limit = request.limit or LIMIT
        chosen = (
            self._diverse(candidates, utility, limit) if self._diversity else self._best(candidates, utility, limit)
        )
        timings = pb.Timings(
            retrieve_us=int((retrieved_s - begun_s) * 1e6),
            blend_us=int((blended_s - retrieved_s) * 1e6),
            select_us=int((time.perf_counter() - blended_s) * 1e6),
            batch_rows=1,
        )
        return self._reply(request.request_id, candidates[chosen].tolist(), utility[chosen].tolist(), timings)

    def _retrieve(
        self, query: NDArray[np.float32], languages: list[str]
    ) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
        """Eligible streams closest to query float32[1, D]: rows int64[k], cosines float32[k], best first."""
        eligible = self._live
        if languages:
            eligible = eligible & np.logical_or.reduce([self._of_language.get(name, False) for name in languages])
        bitmap = np.packbits(eligible, bitorder="little")
        # FAISS's stub does not know the Python side of these two constructors.
        selector = faiss.IDSelectorBitmap(bitmap)  # type: ignore[call-arg, arg-type]
        parameters = faiss.SearchParameters(sel=selector)  # type: ignore[call-arg]
        similarity, rows = self._index.search(query, min(CANDIDATES, len(self._ids)), params=parameters)
        found = int(np.count_nonzero(rows[0] >= 0))  # -1 stands at the end, where too few were eligible
        return rows[0, :found], similarity[0, :found]

    def _best(self, candidates: NDArray[np.int64], utility: NDArray[np.float32], limit: int) -> list[int]:
        """Indices of candidates, best first, at most CREATOR_CAP per creator."""
        order = np.argsort(-utility)
        chosen: list[int] = []
        places: dict[int, int] = {}
        for i, creator in zip(order.tolist(), self._creator[candidates[order]].tolist(), strict=True):
            taken = places.get(creator, 0)
            if taken < CREATOR_CAP:
                places[creator] = taken + 1
                chosen.append(i)
                if len(chosen) == limit:
                    break
        return chosen

    def _diverse(self, candidates: NDArray[np.int64], utility: NDArray[np.float32], limit: int) -> list[int]:
        """The same by maximal marginal relevance, among the best MMR_CANDIDATES."""
        pool = np.argsort(-utility)[:MMR_CANDIDATES]
        rows = candidates[pool]
        vectors, creators, worth = self._embedding[rows], self._creator[rows], utility[pool].copy()
        closest = np.zeros(len(pool), np.float32)
        chosen: list[int] = []
        places: dict[int, int] = {}
        for _ in range(min(limit, len(pool))):
            i = int(np.argmax(worth - self._diversity * closest))
            if worth[i] == -np.inf:
                break
            chosen.append(int(pool[i]))
            np.maximum(closest, vectors @ vectors[i], out=closest)
            worth[i] = -np.inf
            creator = int(creators[i])
            places[creator] = places.get(creator, 0) + 1
            if places[creator] == CREATOR_CAP:
                worth[creators == creator] = -np.inf
        return chosen

    def _reply(self, request_id: str, rows: list[int], scores: list[float], timings: pb.Timings) -> pb.RankResponse:
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
        for row, score in zip(rows, scores, strict=True):  # add() with keywords is the quickest way measured
            add(stream_id=ids[row], score=score, epoch=1, verify_by_ms=verify_by_ms, sources=1, exploration=0.0)
        return reply


async def serve(streams: int, diversity: float, port_file: Path) -> None:
    """Serves until SIGTERM."""
    stop = asyncio.Event()
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, stop.set)
    server = grpc.aio.server(options=[("grpc.so_reuseport", 0)])
    pb_grpc.add_RankingServicer_to_server(Textbook(streams, diversity), server)
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    announce(port_file, port)
    await stop.wait()
    await server.stop(grace=1.0)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--streams", type=int, required=True)
    parser.add_argument("--diversity", type=float, default=0.0, help="0: order by utility")
    parser.add_argument("--port-file", type=Path, required=True, help="written with the bound port once serving")
    given = parser.parse_args()
    asyncio.run(serve(given.streams, given.diversity, given.port_file))
