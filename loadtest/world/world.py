"""The simulated platform itself: one step after another on its own clock."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from loadtest.world import audience
from loadtest.world.actions import Actions
from loadtest.world.delivery import Delivery
from loadtest.world.events import EventKind, Outbox, WorldEvents
from loadtest.world.lifecycle import Lifecycle
from loadtest.world.population import Population, Viewer
from loadtest.world.producers import Producers
from loadtest.world.settings import WorldSettings
from loadtest.world.streams import State, StreamColumns
from loadtest.world.truth import Truth
from loadtest.world.viewing import Viewing

_SEGMENT_MS = 500  # a media segment; at most one heartbeat period, so that every heartbeat shows progress


class World:
    """A live-commerce platform. Pure: no clock but its own, no threads, no I/O; equal settings, equal events.

    ``step`` returns what reaches the server in one step; ``truth`` knows what really happened.
    Not thread-safe.
    """

    def __init__(self, settings: WorldSettings | None = None) -> None:
        self.settings = settings or WorldSettings()
        self.population = Population(self.settings)
        self.streams = StreamColumns(self.settings, self.population)
        self.truth = Truth(self.streams, self.settings.start_ms)
        self.viewing = Viewing(self.settings, self.streams)
        self._producers = Producers(self.settings)
        self._actions = Actions(self.settings, self.population, self._producers)
        self._delivery = Delivery(self.settings, self._producers)
        self._lifecycle = Lifecycle(
            self.settings, self.population, self.streams, self.truth, self._producers, self._actions
        )
        self._out = Outbox()
        # Independent streams of chance: a change in one part leaves the others' draws alone.
        self._fate, self._crowds, self._deeds, self._network = (
            np.random.Generator(np.random.SFC64(seed))
            for seed in np.random.SeedSequence([self.settings.seed, 3]).spawn(4)
        )
        self._now_ms = self.settings.start_ms
        self._segment_ms = min(_SEGMENT_MS, self.settings.heartbeat_ms)
        if self.settings.warm_start:
            self._lifecycle.begin_warm(self._out, self._fate)

    @property
    def now_ms(self) -> int:
        """The simulated clock, Unix epoch."""
        return self._now_ms

    @property
    def live_rows(self) -> NDArray[np.int32]:
        """int32[L] rows of streams whose media flows now."""
        active = self._lifecycle.active
        return np.asarray(active[self.streams.state[active] == State.LIVE])

    def step(self) -> WorldEvents:
        """Moves the clock by ``step_ms`` and returns what is delivered meanwhile, old and new."""
        s = self.settings
        before_ms, self._now_ms = self._now_ms, self._now_ms + s.step_ms
        now_ms = self.truth.now_ms = self._now_ms
        self._lifecycle.begin(before_ms, now_ms, self._out, self._fate)
        active = self._lifecycle.active
        if len(active):
            audience.advance(self.streams, active, now_ms, s, self._crowds)
            self._heartbeats(active, now_ms)
            self._viewer_counts(active, now_ms)
            self._flush(active, now_ms)
        self._lifecycle.end(now_ms, self._out, self._fate)
        if s.record_viewers_ms and now_ms // s.record_viewers_ms > before_ms // s.record_viewers_ms:
            self.truth.record(now_ms, self._lifecycle.active)
        return self._delivery.step(self._out, self.streams, now_ms, self._network)

    def sample_viewers(self, n: int, rng: np.random.Generator) -> NDArray[np.int64]:
        """int64[n] numbers of viewers who ask for a ranking; some ask often."""
        return self.population.sample_viewers(n, rng)

    def viewer(self, number: int) -> Viewer:
        """Who viewer ``number`` is; the same whenever asked."""
        return self.population.viewer(number)

    def _heartbeats(self, active: NDArray[np.int32], now_ms: int) -> None:
        streams, every = self.streams, self.settings.heartbeat_ms
        rows = active[streams.next_heartbeat_ms[active] <= now_ms]
        while len(rows):  # more than once where a step is longer than the period
            time_ms = streams.next_heartbeat_ms[rows]
            streams.next_heartbeat_ms[rows] = time_ms + every
            state, until = streams.state[rows], streams.media_until_ms[rows]
            hung = state == State.HUNG
            sent = hung | ((state == State.LIVE) & (time_ms < until))
            media_ms = np.minimum(time_ms, until) - streams.epoch_started_ms[rows]
            stream = rows[sent]
            self._out.add(
                EventKind.HEARTBEAT, self._producers.media(stream), stream, time_ms[sent],
                epoch=streams.epoch[stream], value=media_ms[sent] // self._segment_ms + 1,
            )  # fmt: skip
            rows = rows[time_ms + every <= now_ms]

    def _viewer_counts(self, active: NDArray[np.int32], now_ms: int) -> None:
        streams, every = self.streams, self.settings.viewer_count_ms
        rows = active[streams.next_viewer_count_ms[active] <= now_ms]
        if len(rows) == 0:
            return
        time_ms = streams.next_viewer_count_ms[rows]
        # One gauge per step is enough, however long the step.
        streams.next_viewer_count_ms[rows] = time_ms + ((now_ms - time_ms) // every + 1) * every
        state = streams.state[rows]
        sent = ((state == State.LIVE) & (time_ms < streams.media_until_ms[rows])) | (state == State.HUNG)
        stream = rows[sent]
        self._out.add(
            EventKind.VIEWER_COUNT, self._producers.media(stream), stream, time_ms[sent],
            epoch=streams.epoch[stream], value=streams.viewers[stream] + streams.bots[stream],
        )  # fmt: skip

    def _flush(self, active: NDArray[np.int32], now_ms: int) -> None:
        streams, every = self.streams, self.settings.interaction_ms
        rows = active[streams.next_flush_ms[active] <= now_ms]
        if len(rows) == 0:
            return
        time_ms = streams.next_flush_ms[rows]
        streams.next_flush_ms[rows] = time_ms + ((now_ms - time_ms) // every + 1) * every
        # The last flush of a stream that ends within this step is the end's own.
        staying = (streams.state[rows] >= State.DEAD) | (time_ms < streams.end_ms[rows])
        self._actions.flush(streams, rows[staying], time_ms[staying], self._deeds, self._out)
