"""What viewers do, told by the apps: counts per stream and interval, a few of them with the viewer's name."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from loadtest.world.audience import BURSTS
from loadtest.world.events import REPORT_REASONS, EventKind, Outbox
from loadtest.world.population import Population
from loadtest.world.producers import Producers
from loadtest.world.settings import WorldSettings
from loadtest.world.streams import RECENT_VIEWERS, Flaw, State, StreamColumns

_MAX_WATCHED_S = 86_400.0  # contract: seconds of one Watched event
_MAX_AMOUNT_MINOR = 1e12
_SPAM_PER_S = 20.0  # chats
_SPAMMERS = 4  # accounts that write all the spam of one stream
_FOLLOWS, _SHARES, _REPORTS = 0.0005, 0.0006, 0.000002  # per viewer and second
_LOT_CROWD = 300.0  # viewers at which bidding and buying reach half of their limit
_MARK_SPAM, _BLOCK = 3, 1  # Moderated.Action


class Actions:
    """Turns what crowds did since the last flush into events."""

    def __init__(self, settings: WorldSettings, population: Population, producers: Producers) -> None:
        self._settings = settings
        self._population = population
        self._producers = producers
        categories, markets = settings.categories, settings.markets
        self._base = np.array([(c.chats, c.likes, c.bids, c.purchases) for c in categories])
        self._median_minor = np.array([[c.median_usd / m.minor_unit_usd for m in markets] for c in categories])
        self._burst = np.array([(b.chats, b.likes, b.shares, b.money) for b in BURSTS])

    def flush(
        self,
        streams: StreamColumns,
        rows: NDArray[np.int32],
        time_ms: NDArray[np.int64],
        rng: np.random.Generator,
        out: Outbox,
    ) -> None:
        """Emits the actions of the streams ``rows`` [R] since their last flush, dated ``time_ms`` [R]."""
        if len(rows) == 0:
            return
        joins, leaves = streams.unflushed_joins[rows], streams.unflushed_leaves[rows]
        seconds = streams.unflushed_viewer_s[rows]
        streams.unflushed_joins[rows] = 0
        streams.unflushed_leaves[rows] = 0
        streams.unflushed_viewer_s[rows] = 0.0
        chats, likes, follows, shares, bids, purchases, reports = rng.poisson(self._expected(streams, rows, seconds))
        limit = self._settings.attributed_per_flush

        named = np.minimum(joins, limit)
        self._named(EventKind.JOINED, streams, rows, time_ms, named, rng, out, arriving=True)
        self._counts(EventKind.JOINED, rows, time_ms, joins - named, out)
        named = np.minimum(leaves, (limit + 1) // 2)
        self._named(EventKind.LEFT, streams, rows, time_ms, named, rng, out)
        self._counts(EventKind.LEFT, rows, time_ms, leaves - named, out)
        self._watched(rows, time_ms, seconds, out)

        spam = streams.flaw[rows] == Flaw.CHAT_SPAM
        self._spam(rows[spam], time_ms[spam], chats[spam], out)
        chats = np.where(spam, 0, chats)
        named = np.minimum(chats, limit)
        self._named(EventKind.CHATTED, streams, rows, time_ms, named, rng, out)
        self._counts(EventKind.CHATTED, rows, time_ms, chats - named, out)

        self._counts(EventKind.LIKED, rows, time_ms, likes, out)
        self._counts(EventKind.FOLLOWED, rows, time_ms, follows, out)
        self._counts(EventKind.SHARED, rows, time_ms, shares, out)
        self._money(EventKind.BID, streams, rows, time_ms, bids, rng, out)
        self._money(EventKind.PURCHASED, streams, rows, time_ms, purchases, rng, out)
        self._reported(streams, rows, time_ms, np.minimum(reports, 3), rng, out)
        self._moderated(streams, rows, time_ms, rng, out)

    def _expected(
        self, streams: StreamColumns, rows: NDArray[np.int32], seconds: NDArray[np.float64]
    ) -> NDArray[np.float64]:
        """float64[7, R]: chats, likes, follows, shares, bids, purchases, reports in this interval."""
        flaw = streams.flaw[rows]
        chats, likes, bids, purchases = self._base[streams.category[rows]].T
        burst_chats, burst_likes, burst_shares, burst_money = self._burst[streams.burst[rows]].T
        excitement = streams.excitement[rows]
        mood = streams.engagement[rows] * np.exp(0.6 * streams.momentum[rows])
        # There is little to do at a still picture.
        mood = np.where(streams.state[rows] == State.LIVE, mood, 0.2 * mood)
        done = seconds * mood
        spam = _SPAM_PER_S * self._settings.interaction_ms / 1000
        money = done / (1.0 + streams.viewers[rows] / _LOT_CROWD) * (1.0 + burst_money * excitement)
        return np.stack(
            [
                done * chats * (1.0 + burst_chats * excitement) + np.where(flaw == Flaw.CHAT_SPAM, spam, 0.0),
                done * likes * (1.0 + burst_likes * excitement),
                done * _FOLLOWS * (1.0 + burst_likes * excitement),
                done * _SHARES * (1.0 + burst_shares * excitement),
                money * bids,
                money * purchases,
                seconds * _REPORTS * np.array([1.0, 3.0, 150.0, 150.0])[flaw],
            ]
        )

    def _named(
        self,
        kind: EventKind,
        streams: StreamColumns,
        rows: NDArray[np.int32],
        time_ms: NDArray[np.int64],
        counts: NDArray[np.int64],
        rng: np.random.Generator,
        out: Outbox,
        *,
        arriving: bool = False,
    ) -> None:
        """``counts`` [R] events of one action each, with the viewer's id."""
        which = np.repeat(np.arange(len(rows)), counts)
        stream = rows[which]
        place = rng.integers(0, RECENT_VIEWERS, len(which))
        if arriving:
            viewer = self._population.audience_of(streams.category[stream], rng)
            streams.recent_viewers[stream, place] = viewer
        else:
            viewer = streams.recent_viewers[stream, place]
        out.add(kind, self._producers.app(stream), stream, time_ms[which], viewer=viewer, value=1)

    def _counts(
        self,
        kind: EventKind,
        rows: NDArray[np.int32],
        time_ms: NDArray[np.int64],
        counts: NDArray[np.int64],
        out: Outbox,
    ) -> None:
        """One anonymous event per stream that has any."""
        some = counts > 0
        stream = rows[some]
        out.add(kind, self._producers.app(stream), stream, time_ms[some], value=counts[some])

    def _watched(
        self, rows: NDArray[np.int32], time_ms: NDArray[np.int64], seconds: NDArray[np.float64], out: Outbox
    ) -> None:
        # The time of a large crowd does not fit into one event.
        parts = np.ceil(seconds / _MAX_WATCHED_S).astype(np.int64)
        which = np.repeat(np.arange(len(rows)), parts)
        stream = rows[which]
        value = (seconds / np.maximum(parts, 1))[which]
        out.add(EventKind.WATCHED, self._producers.app(stream), stream, time_ms[which], value=value)

    def _spam(self, rows: NDArray[np.int32], time_ms: NDArray[np.int64], chats: NDArray[np.int64], out: Outbox) -> None:
        """All chats of these streams come from a few accounts that exist for nothing else."""
        for j in range(_SPAMMERS):
            share = (chats + j) // _SPAMMERS
            some = share > 0
            stream = rows[some]
            account = self._settings.n_viewers + stream.astype(np.int64) * _SPAMMERS + j
            out.add(
                EventKind.CHATTED, self._producers.app(stream), stream, time_ms[some],
                viewer=account, value=share[some],
            )  # fmt: skip

    def _money(
        self,
        kind: EventKind,
        streams: StreamColumns,
        rows: NDArray[np.int32],
        time_ms: NDArray[np.int64],
        counts: NDArray[np.int64],
        rng: np.random.Generator,
        out: Outbox,
    ) -> None:
        which = np.repeat(np.arange(len(rows)), np.minimum(counts, self._settings.money_per_flush))
        stream = rows[which]
        median = self._median_minor[streams.category[stream], streams.market[stream]]
        amount = np.clip(np.round(median * rng.lognormal(0.0, 0.6, len(which))), 1.0, _MAX_AMOUNT_MINOR)
        viewer = streams.recent_viewers[stream, rng.integers(0, RECENT_VIEWERS, len(which))]
        out.add(kind, self._producers.checkout(stream), stream, time_ms[which], viewer=viewer, value=amount)

    def _reported(
        self,
        streams: StreamColumns,
        rows: NDArray[np.int32],
        time_ms: NDArray[np.int64],
        counts: NDArray[np.int64],
        rng: np.random.Generator,
        out: Outbox,
    ) -> None:
        which = np.repeat(np.arange(len(rows)), counts)
        stream = rows[which]
        viewer = streams.recent_viewers[stream, rng.integers(0, RECENT_VIEWERS, len(which))]
        reason = rng.integers(0, len(REPORT_REASONS), len(which))
        out.add(
            EventKind.REPORTED, self._producers.app(stream), stream, time_ms[which],
            viewer=viewer, detail=reason,
        )  # fmt: skip

    def _moderated(
        self,
        streams: StreamColumns,
        rows: NDArray[np.int32],
        time_ms: NDArray[np.int64],
        rng: np.random.Generator,
        out: Outbox,
    ) -> None:
        """Trust & safety finds some of the bad streams, each once."""
        chance = self._settings.adversity.moderated_per_minute * self._settings.interaction_ms / 60_000
        bad = (streams.flaw[rows] != Flaw.NONE) & ~streams.moderated[rows]
        found = bad & (rng.random(len(rows)) < chance)
        stream = rows[found]
        streams.moderated[stream] = True
        worst = (streams.flaw[stream] == Flaw.LOW_QUALITY) & (rng.random(len(stream)) < 0.3)
        out.add(
            EventKind.MODERATED, self._producers.control(stream), stream, time_ms[found],
            value=np.where(worst, _BLOCK, _MARK_SPAM),
        )  # fmt: skip
