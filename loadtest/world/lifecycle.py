"""How streams begin, drop out, come back and end, and what is told about it.

Only these rare moments are looped over.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from loadtest.world.actions import Actions
from loadtest.world.audience import daily_factor, target
from loadtest.world.delivery import delivered_ms
from loadtest.world.events import LOST, EventKind, Outbox
from loadtest.world.population import Population
from loadtest.world.producers import Producers
from loadtest.world.settings import WorldSettings
from loadtest.world.streams import NEVER, RECENT_VIEWERS, Flaw, State, StreamColumns
from loadtest.world.titles import title
from loadtest.world.truth import Truth

_MIN_SESSION_MS = 10_000
_MIN_GAP_MS = 2_000
_BREAK_MS = (3_000, 120_000)  # pause before a comeback
_DRAIN_MS = (30_000, 120_000)  # viewers of a dead stream are gone after
_HUNG_MS = (60_000, 600_000)  # a hung encoder is switched off after
_OLD_END_SENT = 0.7  # a new epoch after a gap: the old one's end is told as well
_OLD_END_MEAN_MS = 10_000


class Lifecycle:
    """Owns which streams are active: every row with a state other than OFF, in order of activation."""

    def __init__(
        self,
        settings: WorldSettings,
        population: Population,
        streams: StreamColumns,
        truth: Truth,
        producers: Producers,
        actions: Actions,
    ) -> None:
        self._settings = settings
        self._population = population
        self._streams = streams
        self._truth = truth
        self._producers = producers
        self._actions = actions
        self.active = np.empty(0, np.int32)
        self._creator_busy = np.zeros(settings.n_creators, np.bool_)
        self._comebacks: list[tuple[int, int]] = []  # (when_ms, row)

    # Beginnings

    def begin_warm(self, out: Outbox, rng: np.random.Generator) -> None:
        """Starts ``target_live`` streams that have been running for a while; their starts are told now."""
        s, streams = self._settings, self._streams
        n = round(s.target_live * daily_factor(s.start_ms, s))
        rows = self._create(n, rng)
        # Whoever looks at a random moment finds long sessions more often: exactly one more sigma squared.
        length = self._session_ms(n, rng, found_running=True)
        started = s.start_ms - (length * rng.random(n)).astype(np.int64)
        streams.started_ms[rows] = started
        streams.end_ms[rows] = np.maximum(started + length, s.start_ms + s.step_ms + 1)
        viewers = rng.poisson(target(streams, rows, s.start_ms, daily_factor(s.start_ms, s)))
        streams.viewers[rows] = streams.initial_viewers[rows] = viewers
        self._on_air(rows, np.full(n, s.start_ms, np.int64), out, rng)

    def begin(self, from_ms: int, now_ms: int, out: Outbox, rng: np.random.Generator) -> None:
        """New streams, comebacks, and encoders that are back, within (from_ms, now_ms]."""
        s, streams = self._settings, self._streams
        rate = s.target_live / s.mean_session_ms * daily_factor(now_ms, s)
        idle = s.n_creators - int(self._creator_busy.sum())
        n = min(int(rng.poisson(rate * (now_ms - from_ms))), idle)
        if n:
            rows = self._create(n, rng)
            times = np.sort(rng.integers(from_ms + 1, now_ms + 1, n))
            self._open_sessions(rows, times, out, rng)
        if self._comebacks and self._comebacks[0][0] <= now_ms:
            due = [(t, row) for t, row in self._comebacks if t <= now_ms]
            self._comebacks = self._comebacks[len(due) :]
            rows = np.array([row for _, row in due], np.int32)
            self._open_sessions(rows, np.array([t for t, _ in due], np.int64), out, rng)
        active = self.active
        resume_ms = streams.resume_ms[active]
        in_time = (resume_ms <= now_ms) & (resume_ms < streams.end_ms[active])
        back = active[(streams.state[active] == State.GAP) & in_time]
        if len(back):
            self._resume(back, now_ms, out, rng)

    def _create(self, n: int, rng: np.random.Generator) -> NDArray[np.int32]:
        """Rows of ``n`` new streams by creators that are not live, not yet on air."""
        s, a, streams = self._settings, self._settings.adversity, self._streams
        creator = rng.choice(np.flatnonzero(~self._creator_busy), n, replace=False).astype(np.int32)
        self._creator_busy[creator] = True
        category = self._population.creator_category[creator]
        market = self._population.creator_market[creator]
        first = len(streams)
        rows = streams.add(
            [f"stream-{first + i:07d}" for i in range(n)],
            [title(s.categories[c].name, s.markets[m].language, rng) for c, m in zip(category, market)],
            self._population.stream_embeddings(creator, rng),
        )
        streams.creator[rows], streams.category[rows], streams.market[rows] = creator, category, market
        streams.region_locked[rows] = rng.random(n) < s.region_locked
        u = rng.random(n)
        bot, spam = u < a.view_bot, (u >= a.view_bot) & (u < a.view_bot + a.chat_spam)
        streams.flaw[rows] = np.select(
            [bot, spam, u >= 1.0 - a.low_quality],
            [Flaw.VIEW_BOT, Flaw.CHAT_SPAM, Flaw.LOW_QUALITY],
            Flaw.NONE,
        )
        low = streams.flaw[rows] == Flaw.LOW_QUALITY
        streams.flapping[rows] = rng.random(n) < a.flapping

        appeal = rng.standard_normal(n)
        streams.peak[rows] = self._population.creator_audience[creator] * np.exp(0.5 * appeal)
        streams.engagement[rows] = np.exp(0.3 * appeal + 0.25 * rng.standard_normal(n))
        # Short sessions must live faster, or nobody would ever arrive.
        pace = np.clip(s.mean_session_ms / 1000 / 8, 5.0, 240.0)
        holds = np.exp(0.2 * appeal + 0.3 * rng.standard_normal(n)) * np.where(low, 0.4, 1.0)
        streams.stay_s[rows] = pace * holds
        streams.ramp_s[rows] = 1.2 * pace * np.exp(0.4 * rng.standard_normal(n))
        # Most bots are bought for small streams.
        bots = 100 + 6.0 * streams.peak[rows] * rng.lognormal(0.0, 0.5, n)
        streams.bots[rows] = np.where(bot, bots, 0).astype(np.int64)
        streams.momentum[rows] = rng.standard_normal(n)
        streams.ended_ms[rows] = NEVER
        streams.recent_viewers[rows] = self._population.audience_of(np.repeat(category, RECENT_VIEWERS), rng).reshape(
            n, RECENT_VIEWERS
        )
        return rows

    def _open_sessions(
        self, rows: NDArray[np.int32], times: NDArray[np.int64], out: Outbox, rng: np.random.Generator
    ) -> None:
        self._streams.started_ms[rows] = times
        self._streams.end_ms[rows] = times + self._session_ms(len(rows), rng)
        self._on_air(rows, times, out, rng)

    def _session_ms(self, n: int, rng: np.random.Generator, found_running: bool = False) -> NDArray[np.int64]:
        s = self._settings
        mu = np.log(s.mean_session_ms) + (0.5 if found_running else -0.5) * s.session_spread**2
        length = np.exp(mu + s.session_spread * rng.standard_normal(n))
        return np.asarray(np.maximum(length, _MIN_SESSION_MS).astype(np.int64))

    def _on_air(self, rows: NDArray[np.int32], times: NDArray[np.int64], out: Outbox, rng: np.random.Generator) -> None:
        """A new epoch of each row begins at ``times``: activates, tells the start, schedules the rest."""
        s, streams = self._settings, self._streams
        if len(rows) == 0:
            return
        self.active = np.concatenate([self.active, rows[streams.state[rows] == State.OFF]])
        streams.epoch[rows] += 1
        streams.epoch_started_ms[rows] = times
        streams.ended_ms[rows] = NEVER
        streams.next_viewer_count_ms[rows] = times + rng.integers(1, s.viewer_count_ms + 1, len(rows))
        streams.next_flush_ms[rows] = times + rng.integers(1, s.interaction_ms + 1, len(rows))
        self._media_flows(rows, times, rng)
        out.add(EventKind.STARTED, self._producers.media(rows), rows, times, epoch=streams.epoch[rows])

    def _media_flows(self, rows: NDArray[np.int32], times: NDArray[np.int64], rng: np.random.Generator) -> None:
        s, streams = self._settings, self._streams
        streams.state[rows] = State.LIVE
        streams.next_heartbeat_ms[rows] = times + rng.integers(1, s.heartbeat_ms + 1, len(rows))
        gap_in = 1_000 + rng.exponential(s.adversity.flap_every_mean_ms, len(rows)).astype(np.int64)
        end = streams.end_ms[rows]
        streams.media_until_ms[rows] = np.where(streams.flapping[rows], np.minimum(times + gap_in, end), end)
        for row, epoch, time_ms in zip(rows.tolist(), streams.epoch[rows].tolist(), times.tolist()):
            self._truth.open_span(row, epoch, time_ms)

    def _resume(self, rows: NDArray[np.int32], now_ms: int, out: Outbox, rng: np.random.Generator) -> None:
        s, streams = self._settings, self._streams
        times = streams.resume_ms[rows]
        fresh = rng.random(len(rows)) < s.adversity.new_epoch_after_gap
        self._media_flows(rows[~fresh], times[~fresh], rng)
        stopped = streams.media_until_ms[rows[fresh]]
        told = rng.random(len(stopped)) < _OLD_END_SENT
        # The end of the old epoch is usually noticed when the new one is already running.
        delay = times[fresh] - stopped + rng.exponential(_OLD_END_MEAN_MS, len(stopped)).astype(np.int64)
        self._tell_end(rows[fresh][told], stopped[told], delay[told], 1, now_ms, out)
        self._on_air(rows[fresh], times[fresh], out, rng)

    # Ends

    def end(self, now_ms: int, out: Outbox, rng: np.random.Generator) -> None:
        """Gaps and ends due by ``now_ms``."""
        streams, active = self._streams, self.active
        state = streams.state[active]
        over = (state <= State.GAP) & (streams.end_ms[active] <= now_ms)
        drops = (state == State.LIVE) & ~over & (streams.media_until_ms[active] <= now_ms)
        gone = (state >= State.DEAD) & (streams.gone_ms[active] <= now_ms)
        if drops.any():
            self._drop_out(active[drops], rng)
        if gone.any():
            rows = active[gone]
            self._empty(rows, streams.gone_ms[rows], out, rng)
            self._switch_off(rows, now_ms, rng)
        if over.any():
            self._finish(active[over], now_ms, out, rng)
        if gone.any() or over.any():
            self.active = active[streams.state[active] != State.OFF]

    def _drop_out(self, rows: NDArray[np.int32], rng: np.random.Generator) -> None:
        streams = self._streams
        stopped = streams.media_until_ms[rows]
        gap = rng.exponential(self._settings.adversity.flap_gap_mean_ms, len(rows)).astype(np.int64)
        streams.resume_ms[rows] = stopped + _MIN_GAP_MS + gap
        streams.state[rows] = State.GAP
        self._close_spans(rows, stopped)

    def _finish(self, rows: NDArray[np.int32], now_ms: int, out: Outbox, rng: np.random.Generator) -> None:
        """Media stops for good. Most say so at once; the others are why a server must not rely on it."""
        a, streams = self._settings.adversity, self._streams
        # In a gap, media had stopped before.
        stopped = np.minimum(streams.media_until_ms[rows], streams.end_ms[rows])
        streams.ended_ms[rows] = stopped
        live = streams.state[rows] == State.LIVE
        self._close_spans(rows[live], stopped[live])

        edges = np.cumsum([a.silent_death, a.hung_encoder, a.lost_end, a.delayed_end])
        fate = np.searchsorted(edges, rng.random(len(rows)), side="right")
        silent, hung, lost, delayed = (fate == i for i in range(4))
        # An encoder that is away cannot hang.
        silent, hung = silent | (hung & ~live), hung & live
        unseen = silent | hung
        streams.state[rows[unseen]] = np.where(hung[unseen], State.HUNG, State.DEAD)
        linger = np.where(hung, rng.integers(*_HUNG_MS, len(rows)), rng.integers(*_DRAIN_MS, len(rows)))
        streams.gone_ms[rows[unseen]] = (stopped + linger)[unseen]

        delay = np.where(delayed, rng.exponential(a.delayed_end_mean_ms, len(rows)).astype(np.int64), 0)
        delay = np.where(lost, LOST, delay)
        ended = streams.end_ms[rows]  # later than media stopped if in a gap
        self._empty(rows[~unseen], ended[~unseen], out, rng)
        self._tell_end(rows[~unseen], ended[~unseen], delay[~unseen], 0, now_ms, out)
        self._switch_off(rows[~unseen], now_ms, rng)

    def _tell_end(
        self,
        rows: NDArray[np.int32],
        emitted_ms: NDArray[np.int64],
        delay_ms: NDArray[np.int64],
        reason: int,
        now_ms: int,
        out: Outbox,
    ) -> None:
        epochs = self._streams.epoch[rows]
        out.add(
            EventKind.ENDED, self._producers.control(rows), rows, emitted_ms,
            epoch=epochs, detail=reason, delay_ms=delay_ms,
        )  # fmt: skip
        step_ms = self._settings.step_ms
        told = zip(rows.tolist(), epochs.tolist(), emitted_ms.tolist(), delay_ms.tolist())
        for row, epoch, at_ms, delay in told:
            self._truth.end_sent(row, epoch, at_ms, delivered_ms(at_ms, delay, now_ms, step_ms))

    def _empty(
        self, rows: NDArray[np.int32], time_ms: NDArray[np.int64], out: Outbox, rng: np.random.Generator
    ) -> None:
        """Everyone leaves, and the apps tell what was not told yet."""
        streams = self._streams
        viewers = streams.viewers[rows]
        streams.leaves[rows] += viewers
        streams.unflushed_leaves[rows] += viewers
        streams.viewers[rows] = 0
        self._actions.flush(streams, rows, time_ms, rng, out)

    def _switch_off(self, rows: NDArray[np.int32], now_ms: int, rng: np.random.Generator) -> None:
        self._streams.state[rows] = State.OFF
        back = rng.random(len(rows)) < self._settings.adversity.restart
        self._creator_busy[self._streams.creator[rows[~back]]] = False
        if back.any():
            when = now_ms + rng.integers(*_BREAK_MS, int(back.sum()))
            self._comebacks = sorted([*self._comebacks, *zip(when.tolist(), rows[back].tolist())])

    def _close_spans(self, rows: NDArray[np.int32], stopped: NDArray[np.int64]) -> None:
        for row, to_ms in zip(rows.tolist(), stopped.tolist()):
            self._truth.close_span(row, to_ms)
