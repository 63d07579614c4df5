"""The way of a batch of requests on the GPU: the stages of `Pipeline`, queued at once, read back with one copy.

The host prepares (filters of the tick, followed creators, one upload), the device does the rest without being asked
back: search → merge → blend → select → verify → encode. On a GPU the queue of a bucket is captured once as a CUDA
graph and replayed. `start` returns while the device works; `finish` waits for the copy and makes the last check again
on the host, against the newest columns, so that events applied meanwhile count.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch

from kernels.backend import Backend
from kernels.blend_gpu import blend
from kernels.eligibility import FilterColumns
from kernels.merge_gpu import merge_candidates
from kernels.slate_gpu import select_slates
from kernels.tally_gpu import read_tally, tally
from kernels.topk_gpu import masked_topk
from kernels.verify_gpu import verify_picks as verify_on_device
from kernels.wire_gpu import encode_streams
from server.clock import Clock
from server.config import Settings
from server.live.queue import DeviceQueue
from server.live.table import LiveTable
from server.ranking.device_batch import BUCKETS, RankBuffers, Widths, bucket_of
from server.ranking.device_views import DeviceViews
from server.ranking.pipeline import Pipeline, Started
from server.ranking.slates import SlateBatch, StageTimes, Tally
from server.retrieval.exact_gpu import ExactGpuSearch
from server.retrieval.query import QueryBatch
from server.retrieval.sources import SOURCES, bit_of, followed
from server.retrieval.streams import StreamState


@dataclass(frozen=True)
class OnDevice(Started):
    """A batch that the device works on; ``buffers`` None: it is ranked on the host when it is finished."""

    filters: FilterColumns
    began_s: float
    queued_s: float
    buffers: RankBuffers | None


class GpuPipeline(Pipeline):
    """`Pipeline` with the work of a request on the device. Called by the engine thread only.

    What the device's fixed buffers cannot hold (a very long exclusion list, more than 64 distinct filters in one tick),
    what it could not prove, and slates in which a stream went while the device worked, are ranked on the host by the
    same stages, exactly; ``on_host`` is told the reason and how many requests.

    Each bucket has two sets of buffers, used in turn: the host reads one batch while the device works on the next.

    Args:
        search: the engine whose device columns are the embeddings. queue: what the table's accumulators are.
    """

    overlaps = True

    def __init__(
        self,
        settings: Settings,
        clock: Clock,
        table: LiveTable,
        streams: StreamState,
        search: ExactGpuSearch,
        queue: DeviceQueue,
        backend: Backend,
        on_host: Callable[[str, int], None],
    ) -> None:
        super().__init__(settings, clock, table, streams, search)
        self._embeddings, self._queue, self._backend, self._on_host = search, queue, backend, on_host
        self._widths = Widths.of(settings)
        self._views_on_device = DeviceViews(backend, queue.device, self._widths.view)
        self._buffers: dict[tuple[int, int], RankBuffers] = {}
        self._turn = 0
        self._personal_bit = bit_of("personal")

    def rank(self, batch: QueryBatch, quality: float = 1.0) -> SlateBatch:
        """See `Pipeline.rank`."""
        return self.finish(self.start(batch, quality))

    def start(self, batch: QueryBatch, quality: float = 1.0) -> OnDevice:
        """See `Pipeline.start`. Queues the batch on the device and returns."""
        began_s = time.perf_counter()
        filters = self.snapshot.filter_columns(batch.filters)
        buffers = self._stage(batch, filters, quality)
        if buffers is not None:
            buffers.inputs.host["params"][0] = self._clock.now_ms()
            buffers.inputs.upload()
            self.run(buffers)
            buffers.outputs.download()
        return OnDevice(batch, quality, filters, began_s, time.perf_counter(), buffers)

    def finish(self, started: Started) -> SlateBatch:
        """See `Pipeline.finish`. Waits for the device."""
        assert isinstance(started, OnDevice)
        if started.buffers is None:
            return super().rank(started.batch, started.quality)
        started.buffers.outputs.settle()
        waited_s = time.perf_counter()
        found, n = started.buffers.outputs.host, len(started.batch)
        if found["unproven"][:n].any():
            self._on_host("unproven", n)
            return super().rank(started.batch, started.quality)
        slots, counts = found["slots"][:n].copy(), found["counts"][:n].copy()
        now_ms = self._clock.now_ms()
        _, still, _ = self._last_check(started.batch, started.filters, slots, counts, now_ms)
        if not np.array_equal(still, counts):
            # Someone went within the milliseconds of the device's work. The host ranks anew, from the newest columns.
            self._on_host("changed", n)
            return super().rank(started.batch, started.quality)
        width = max(1, int(counts.max(initial=0)))
        shown = slice(0, n), slice(0, width)
        lengths = found["wire_lengths"]
        sums = read_tally(found["tally"], len(SOURCES))
        return SlateBatch(
            batch=started.batch,
            slots=np.ascontiguousarray(slots[:, :width]),
            counts=counts,
            scores=found["scores"][shown].copy(),
            sources=found["sources"][shown].copy().view(np.uint32),
            exploration=found["exploration"][shown].copy(),
            as_of_ms=now_ms,
            times=_times(started, waited_s),
            picks=found["pick_slots"][:n].copy(),
            drops=found["drops"][:n].copy(),
            tally=Tally(
                sums.candidates, sums.served_by, sums.excluded, sums.outcomes, sums.drops, sums.served,
                sums.exploration_served,
            ),
            wire=[found["wire"][b, : lengths[b]].tobytes() for b in range(n)],
        )  # fmt: skip

    def prepare(self) -> None:
        """Runs and captures every bucket, before the server says SERVING: nothing is compiled or allocated later."""
        largest = bucket_of(self._settings.serve.max_batch_rows) or BUCKETS[-1]
        for bucket in BUCKETS[: BUCKETS.index(largest) + 1]:
            for turn in range(2):
                self.run(self.buffers_of(bucket, turn))

    # --- stages -------------------------------------------------------------------------------

    def _stage(self, batch: QueryBatch, filters: FilterColumns, quality: float) -> RankBuffers | None:
        """Buffers filled for the batch, and everything the device needs besides; None: rank on the host."""
        bucket = bucket_of(len(batch))
        if bucket is None:
            self._on_host("batch", len(batch))
            return None
        self._turn ^= 1
        buffers = self.buffers_of(bucket, self._turn)
        joined = self.snapshot.joined(batch.filters, self._view)
        views = [self.snapshot.views[key] for key in batch.filters]
        self._queue.flush()
        self._embeddings.flush()
        places = self._views_on_device.prepare(self.snapshot, batch.filters, views, filters)
        if places is None or not buffers.fits(batch):
            self._on_host("widths", len(batch))
            return None
        filter_of = joined.rows_of(batch.filters, batch.filter_of)
        work, view_limits = self._work(batch, joined, filter_of, quality)
        personal_limit = work.share(self._widths.personal)
        buffers.fill(batch, places, view_limits, personal_limit, followed(work), self.snapshot)
        return buffers

    def run(self, buffers: RankBuffers) -> None:
        """The queue of kernels over a bucket's buffers: replayed on a GPU, launched one by one elsewhere."""
        if not self._backend.on_gpu:
            self._queue_kernels(buffers)
            return
        if buffers.graph is None:
            self._queue_kernels(buffers)  # compiles; a capture must not
            torch.cuda.synchronize()
            buffers.graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(buffers.graph):
                self._queue_kernels(buffers)
        buffers.graph.replay()

    def _queue_kernels(self, buffers: RankBuffers) -> None:
        """Everything between upload and download: fixed shapes, no allocation, nothing asked back."""
        i, w, o, t = buffers.inputs.device, buffers.work, buffers.outputs.device, self._queue.device.tensors
        views, engine, params = self._views_on_device, self._embeddings, i["params"]
        masked_topk(
            i["queries"], engine.table, engine.table16, engine.longest, views.eligible, i["filter_of"],
            self._widths.personal, params, work=buffers.topk, slots=w["personal"], scores=w["personal_scores"],
            unproven=o["unproven"],
        )  # fmt: skip
        merge_candidates(
            views.view_slots, views.view_sources, i["filter_of"], w["personal"], self._personal_bit,
            i["followed"], self._followed_bit, i["excluded"], i["view_limits"], params,
            slots=w["slots"], sources=w["sources"], counts=w["merged"], dropped=w["dropped"],
        )  # fmt: skip
        blend(
            w["slots"], w["sources"], i["queries"], t["trend"], t["boost"], t["started_ms"], engine.table, i["weights"],
            params, followed_bit=self._followed_bit, fresh_bit=self._fresh_bit,
            utility=w["utility"], similarity=w["similarity"],
        )  # fmt: skip
        select_slates(
            w["slots"], w["utility"], w["sources"], t["creator"], t["category"], engine.table, t["id_words"],
            i["limits"], i["explore_slots"], i["seeds"], i["creator_caps"], i["category_caps"], i["diversity"],
            self._settings.rank.reserve, explorable_bit=self._fresh_bit, order=w["order"], picks=w["picks"],
            exploration=w["exploration"], n_slate=w["n_slate"], n_reserve=w["n_reserve"], outcome=w["outcome"],
        )  # fmt: skip
        verify_on_device(
            w["picks"], w["n_slate"], w["n_reserve"], w["exploration"], w["slots"], w["utility"], w["sources"],
            i["limits"], i["filter_of"], views.rows, views.filters, params,
            out_slots=o["slots"], out_scores=o["scores"], out_sources=o["sources"], out_exploration=o["exploration"],
            counts=o["counts"], pick_slots=o["pick_slots"], drops=o["drops"],
        )  # fmt: skip
        encode_streams(
            o["slots"], o["counts"], o["scores"], t["epoch"], t["lease_expires_ms"], o["sources"], o["exploration"],
            t["id_words"], t["id_lengths"], buffer=o["wire"], lengths=o["wire_lengths"],
        )  # fmt: skip
        tally(
            w["slots"], w["sources"], w["outcome"], w["dropped"], i["limits"], o["pick_slots"], o["drops"],
            o["slots"], o["sources"], o["exploration"], counts=o["tally"],
        )  # fmt: skip

    def buffers_of(self, bucket: int, turn: int = 0) -> RankBuffers:
        """One of the two sets of buffers of a bucket, made on first use."""
        if (bucket, turn) not in self._buffers:
            self._buffers[bucket, turn] = RankBuffers(bucket, self._widths, self._settings, self._backend)
        return self._buffers[bucket, turn]


def _times(started: OnDevice, waited_s: float) -> StageTimes:
    """The host's preparation as retrieve, the wait for the device as select, the last check as verify."""
    return StageTimes(
        retrieve_us=int((started.queued_s - started.began_s) * 1e6),
        select_us=int((waited_s - started.queued_s) * 1e6),
        verify_us=int((time.perf_counter() - waited_s) * 1e6),
    )
