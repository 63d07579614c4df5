"""Producers, rankers and watchers against one address, and the history they leave."""

from __future__ import annotations

import threading
import time
from dataclasses import dataclass

import grpc
from liverank.v1 import admin_pb2, admin_pb2_grpc, liveness_pb2, liveness_pb2_grpc, ranking_pb2, ranking_pb2_grpc

from loadtest.liveness.audience import CHECKED, Ranker, Watcher, in_thread
from loadtest.liveness.history import ENDED, STARTED, EventSent, FinalState, History, Moment
from loadtest.liveness.producer import CHANNEL_OPTIONS, Outlet, Producer
from loadtest.processes import wait_for

STATES = ("UNKNOWN", "LIVE", "SUSPECT", "ENDED")
WITHIN_S = 60.0

CHECKED_TABLE = {
    "capacity": 4_000, "lease_ms": 1_500, "grace_ms": 1_500, "max_lateness_ms": 300_000, "tombstone_ms": 600_000,
}  # fmt: skip
"""Table settings under which leases run out within a short run and no tombstone does."""


@dataclass(frozen=True)
class TrafficPlan:
    """How much of what. skews_ms: clocks of the producers, taken in turn; ahead and behind."""

    producers: int = 3
    streams_each: int = 16
    rankers: int = 2
    watchers: int = 2
    lease_ms: int = CHECKED_TABLE["lease_ms"]
    skews_ms: tuple[int, ...] = (0, -300, 2_000)
    producer_pause_s: float = 0.01
    ranker_pause_s: float = 0.002
    seed: int = 1


class Traffic:
    """Starts everybody at once; ``finish`` asks the server how things stand and returns the history.

    The server may die and come back at the same address in between.

    Raises:
        TimeoutError: the server did not let the watchers in, or did not answer at the end.
    """

    def __init__(self, address: str, plan: TrafficPlan) -> None:
        self.plan, self.history = plan, History()
        self._channel = grpc.insecure_channel(address, options=CHANNEL_OPTIONS)
        # Several runs may share a server: names carry the time.
        run = f"{time.time_ns() // 1_000_000 % 100_000_000:08}"
        self.watchers = [Watcher(f"watcher-{i}", address, self.history, plan.seed + i) for i in range(plan.watchers)]
        self._threads = [in_thread("watcher", w.run) for w in self.watchers]
        try:
            wait_for(lambda: len(self.history.watching) == plan.watchers, WITHIN_S, "watchers are subscribed")
            self._first_end(Outlet(address, self.history), f"first-{run}")
        except TimeoutError:
            for watcher in self.watchers:
                watcher.hang_up()
            raise
        self.producers = [
            Producer(
                f"p{i}-{run}", address, self.history, plan.streams_each, plan.lease_ms,
                plan.skews_ms[i % len(plan.skews_ms)], plan.seed * 1_000 + i, plan.producer_pause_s,
            )
            for i in range(plan.producers)
        ]  # fmt: skip
        stream_ids = [stream_id for producer in self.producers for stream_id in producer.stream_ids]
        self._stream_ids = stream_ids
        self.rankers = [
            Ranker(f"ranker-{i}", address, self.history, stream_ids, plan.ranker_pause_s) for i in range(plan.rankers)
        ]
        self._producing = [in_thread("producer", p.run) for p in self.producers]
        self._threads += [in_thread("ranker", r.run) for r in self.rankers]

    def _first_end(self, outlet: Outlet, stream_id: str) -> None:
        """Every watcher has heard one end before anything else: from then on it has a place to resume from."""
        now = Moment.now()
        events = (
            EventSent(1, stream_id, 1, STARTED, now.at_ms),
            EventSent(2, stream_id, 1, ENDED, now.at_ms),
        )
        if outlet.send(stream_id, events) is None:
            raise TimeoutError("the first batch was not acknowledged")
        outlet.close()
        wait_for(lambda: all(w.after for w in self.watchers), WITHIN_S, "every watcher heard the first end")

    def finish(self) -> History:
        """Everything settles: what is live is live for certain, then the end states are taken."""
        for producer in self.producers:
            producer.calm.set()
        threading.Event().wait(0.5)  # a few calm batches; nothing waits for this, it only makes the check sharper
        for producer in self.producers:
            producer.stop.set()
        for thread in self._producing:
            thread.join(WITHIN_S)
        for ranker in self.rankers:
            ranker.stop.set()
        self._take_final_states()
        self._wait_for_notices()
        for watcher in self.watchers:
            watcher.hang_up()
        for thread in self._threads:
            thread.join(WITHIN_S)
        self._channel.close()
        self.history.ended = Moment.now()
        return self.history

    def _take_final_states(self) -> None:
        liveness, ranking = liveness_pb2_grpc.LivenessStub(self._channel), ranking_pb2_grpc.RankingStub(self._channel)
        for start in range(0, len(self._stream_ids), CHECKED):
            refs = [liveness_pb2.StreamRef(stream_id=s) for s in self._stream_ids[start : start + CHECKED]]
            checked = liveness.CheckLive(
                liveness_pb2.CheckLiveRequest(streams=refs), timeout=WITHIN_S, wait_for_ready=True
            )
            for status in checked.streams:
                self.history.final[status.stream_id] = FinalState(STATES[status.state], status.epoch, checked.as_of_ms)
            self.history.applied_offset = checked.applied_offset
        for stream_id, state in list(self.history.final.items()):
            if state.state in ("UNKNOWN", "ENDED"):
                continue
            told = ranking.Explain(ranking_pb2.ExplainRequest(stream_id=stream_id), timeout=WITHIN_S)
            viewers = next(f.value for f in told.features if f.name == "viewers")
            self.history.final[stream_id] = FinalState(state.state, state.epoch, state.as_of_ms, viewers)

    def _wait_for_notices(self) -> None:
        """What is on its way to the watchers gets a moment to arrive; what never arrives is for the judge."""
        due = {
            (event.stream_id, event.epoch)
            for batch in self.history.batches if batch.acked
            for i, event in enumerate(batch.events) if event.kind == ENDED and i not in batch.codes
        }  # fmt: skip

        def all_heard() -> bool:
            heard: dict[str, set[tuple[str, int]]] = {}
            for notice in list(self.history.heard):
                heard.setdefault(notice.watcher, set()).add((notice.stream_id, notice.epoch))
            return all(due <= heard.get(watcher, set()) for watcher in self.history.watching)

        try:
            wait_for(all_heard, 3.0, "notices")
        except TimeoutError:
            return  # the judge says which are missing


def applied_offset(address: str) -> int:
    """Last offset applied by the server at ``address``."""
    with grpc.insecure_channel(address, options=CHANNEL_OPTIONS) as channel:
        status = admin_pb2_grpc.AdminStub(channel).Status(admin_pb2.StatusRequest(), timeout=WITHIN_S)
        return int(status.applied_offset)
