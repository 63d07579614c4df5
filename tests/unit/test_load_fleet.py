"""A load's own streams: who is popular, what stays alive, what ends; and events on their way."""

from __future__ import annotations

import itertools
import socket
import threading
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kernels.counters import COUNTERS, HALF_LIVES_MS
from loadtest.bench.catalogue import make_catalogue, stream_id
from loadtest.bench.event_columns import KINDS, as_messages, as_redis, as_redis_counts, draw, has_columns
from loadtest.bench.inprocess import NOW_MS, fill_in_process
from loadtest.bench.redis_rival import Connection, pipeline
from loadtest.bench.soak import slope
from loadtest.load.fleet import Fleet, zipf_draws
from loadtest.load.observe import stage_means, stage_sums
from loadtest.load.publisher import STEP_S, Crowd
from loadtest.load.scenario import DEFAULT_MIX
from server.live.events import decode_batch
from server.telemetry.metrics import Metrics


def fleet(streams: int = 50, heartbeat_ms: int = 1_000) -> Fleet:
    found = Fleet("f", heartbeat_ms, 4, 1.0, np.random.default_rng(1))
    found.starts(streams, 10_000)
    return found


def payloads(events: list[Any]) -> Counter[str]:
    return Counter(event.WhichOneof("payload") for event in events)


@given(st.integers(1, 500), st.floats(0.0, 3.0), st.integers(0, 200))
def test_zipf_draws_stay_within_their_range(count: int, exponent: float, n: int) -> None:
    drawn = zipf_draws(count, exponent, n, np.random.default_rng(0))
    assert len(drawn) == n and np.all((drawn >= 0) & (drawn < count))


def test_zipf_draws_follow_their_exponent() -> None:
    rng = np.random.default_rng(3)
    counts = np.bincount(zipf_draws(1_000, 1.0, 200_000, rng), minlength=1_000)
    assert counts[0] / counts[9] == pytest.approx(10.0, rel=0.1)
    even = np.bincount(zipf_draws(10, 0.0, 100_000, rng), minlength=10)
    assert even.max() / even.min() < 1.1


def test_every_live_stream_proves_media_once_per_period_and_the_ended_no_more() -> None:
    ours = fleet(40)
    beats = [event.stream_id for now_ms in range(10_100, 13_001, 100) for event in ours.heartbeats(now_ms)]
    assert set(Counter(beats).values()) <= {2, 3} and len(set(beats)) == 40
    over = {event.stream_id for event in ours.ends(0.5, 13_000)}
    assert len(over) == 20 == len(ours.live)
    later = {event.stream_id for now_ms in range(13_100, 15_001, 100) for event in ours.heartbeats(now_ms)}
    assert not over & later and len(later) == 20


def test_events_go_to_live_streams_in_the_wanted_mix() -> None:
    ours = fleet(30)
    ours.ends(0.9, 10_000)
    events = ours.deeds(4_000, {"liked": 3.0, "chatted": 1.0}, 11_000)
    found = payloads(events)
    assert set(found) == {"liked", "chatted"} and found["liked"] / found["chatted"] == pytest.approx(3.0, rel=0.15)
    assert {event.stream_id for event in events} <= {ours.stream_id(number) for number in ours.live}
    assert set(payloads(ours.deeds(5_000, DEFAULT_MIX, 11_000))) == set(DEFAULT_MIX)
    ours.ends(1.0, 12_000)
    assert ours.deeds(10, DEFAULT_MIX, 12_000) == [] == ours.ends(1.0, 12_000) == ours.crowd(1, 5, 5, 12_000)


@given(st.integers(0, 500), st.integers(0, 500), st.floats(0.05, 3.0))
@settings(max_examples=50)
def test_a_raid_brings_exactly_its_crowd_to_one_stream(joins: int, chats: int, over_s: float) -> None:
    ours, crowd = fleet(9), Crowd(100.0, 100.0 + over_s, 7, joins, chats)
    events: list[Any] = []
    for step in range(int(over_s / STEP_S) + 4):
        events += ours.crowd(crowd.place, *crowd.due(100.0 + step * STEP_S), 11_000)
    assert payloads(events) == +Counter({"joined": joins, "chatted": chats})
    assert {event.stream_id for event in events} <= {"f-6"} and crowd.due(1e9) == (0, 0)


def test_redis_is_asked_for_the_very_sums_that_the_live_table_keeps() -> None:
    inside = fill_in_process(make_catalogue(20))
    table = inside.table
    rows = draw(400, 20, NOW_MS, np.random.default_rng(2))
    assert set(rows.kind) == set(range(len(KINDS)))
    slot_of = {table.stream_id(slot): slot for slot in range(table.rows)}
    slots = [slot_of[stream_id(i)] for i in range(20)]
    before = table.columns.counters[slots].copy()
    batch = decode_batch(as_messages(rows, slice(0, 400), "p", 1), inside.settings.table)
    assert not batch.rejected
    applied = table.apply(batch.events, NOW_MS)
    assert not applied.codes.any()
    grown = table.columns.counters[slots] - before

    words = as_redis(rows, slice(0, 400), table.landmark_ms).payload.split(b"\r\n")
    asked = np.zeros_like(grown, np.float64)
    rates = {"bid": 0.0108, "purchased": 0.0108}
    for at, word in enumerate(words):
        if word == b"HINCRBYFLOAT":
            key, field, amount = words[at + 2].decode(), words[at + 4].decode(), float(words[at + 6])
            counter, half_life = field.split(":")
            place = COUNTERS.index(counter), HALF_LIVES_MS.index(int(half_life))
            worth = rates["bid"] if counter in ("bid_value", "purchase_value") else 1.0
            asked[(int(key.removeprefix("stream-")), *place)] += amount * worth
    np.testing.assert_allclose(asked, grown, rtol=2e-3, atol=1e-3)
    assert words.count(b"PFADD") == np.isin(rows.kind, [KINDS.index("joined"), KINDS.index("chatted")]).sum()


def test_counting_alone_is_one_command_per_event() -> None:
    rows = draw(100, 10, NOW_MS, np.random.default_rng(0))
    found = as_redis_counts(rows, slice(0, 100))
    assert found.lines == 100 and found.payload.count(b"HINCRBY\r\n") == 100


@pytest.mark.skipif(not has_columns(), reason="EventBatch has no field `arrow` in this build")
def test_both_forms_of_a_batch_are_the_same_events() -> None:
    from loadtest.bench.event_columns import as_arrow

    settings = fill_in_process(make_catalogue(2)).settings.table
    rows = draw(300, 20, NOW_MS, np.random.default_rng(4))
    one, other = (decode_batch(make(rows, slice(0, 300), "p", 1), settings).events for make in (as_messages, as_arrow))
    for name in ("sequence", "ids", "kind", "epoch", "time_ms", "value", "viewer_hash"):
        np.testing.assert_array_equal(getattr(one, name), getattr(other, name), name)


class Peer:
    """The other end of a connection: answers with pieces as they are given."""

    def __init__(self, folder: Path, *pieces: bytes) -> None:
        self.path = folder / "peer.sock"
        listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        listener.bind(str(self.path))
        listener.listen(1)

        def answer() -> None:
            with listener, listener.accept()[0] as peer:
                peer.recv(1 << 16)
                for piece in pieces:
                    peer.sendall(piece)

        self.thread = threading.Thread(target=answer)
        self.thread.start()


@given(st.lists(st.integers(1, 40), max_size=6))
@settings(max_examples=25, deadline=None)
def test_replies_are_counted_however_they_are_cut(tmp_path_factory: pytest.TempPathFactory, cuts: list[int]) -> None:
    replies = b"$3\r\n1.5\r\n:1\r\n$4\r\n12.5\r\n"
    places = sorted({min(cut, len(replies)) for cut in cuts} | {0, len(replies)})
    peer = Peer(tmp_path_factory.mktemp("p"), *(replies[a:b] for a, b in itertools.pairwise(places)))
    connection = Connection(peer.path)
    connection.send(pipeline([(2, (b"A",)), (1, (b"B",)), (2, (b"C",))]))
    connection.close()
    peer.thread.join()


def test_an_error_among_the_replies_is_raised(tmp_path: Path) -> None:
    peer = Peer(tmp_path, b":1\r", b"\n-ERR no such thing\r\n")
    connection = Connection(peer.path)
    with pytest.raises(RuntimeError, match="ERR no such thing"):
        connection.send(pipeline([(1, (b"A",)), (1, (b"B",))]))
    connection.close()
    peer.thread.join()


@given(st.lists(st.tuples(st.floats(-100, 100), st.floats(-100, 100)), min_size=4, max_size=30))
def test_a_slope_and_its_error_are_those_of_least_squares(points: list[tuple[float, float]]) -> None:
    x, y = np.array(points).T
    found = slope(x, y)
    if np.ptp(x) < 1e-3:
        return
    (wanted, _), covariance = np.polyfit(x - x.mean(), y, 1, cov=True)
    assert found.per_x == pytest.approx(wanted, rel=1e-5, abs=1e-7)
    assert found.error == pytest.approx(float(np.sqrt(covariance[0, 0])), rel=1e-4, abs=1e-6)


def test_noise_has_no_slope_and_a_leak_has_one() -> None:
    hours = np.arange(600) / 3600
    noise = np.random.default_rng(0).normal(0, 0.5, 600)
    assert slope(hours, 200 + noise).is_none
    leak = slope(hours, 200 + 50 * hours + noise)
    assert not leak.is_none and leak.per_x == pytest.approx(50, abs=3 * leak.error)
    assert slope([1.0], [2.0]).is_none and slope([1.0, 1.0], [2.0, 3.0]).is_none


def test_stages_are_read_from_the_servers_own_metrics() -> None:
    from prometheus_client import generate_latest

    metrics = Metrics()
    for seconds in (0.002, 0.004):
        metrics.stage_seconds.labels("retrieve").observe(seconds)
    metrics.rank_seconds.observe(0.010)
    before = stage_sums(generate_latest(metrics.registry).decode())
    assert before["retrieve"] == (pytest.approx(0.006), 2.0) and before["rank"] == (pytest.approx(0.010), 1.0)
    metrics.stage_seconds.labels("retrieve").observe(0.009)
    means = stage_means(before, stage_sums(generate_latest(metrics.registry).decode()))
    assert means["retrieve"] == pytest.approx(9.0) and means["rank"] is None, "it did not run in between"


def test_a_page_that_is_not_the_servers_metrics_is_told() -> None:
    with pytest.raises(ValueError, match="liverank_stage_seconds"):
        stage_sums("# nothing here\n")
