"""The whole way of a batch on the device gives the slates and the bytes that the host gives."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from kernels.backend import CPU, Backend, choose
from loadtest.bench.catalogue import make_catalogue
from loadtest.bench.inprocess import InProcess, fill_in_process
from server.ranking import device_batch, device_views
from server.ranking.slates import ReplyState, SlateBatch
from server.retrieval.query import QueryBatch, build_batch
from server.rpc.encode import encode_replies
from server.scoring.ladder import Level
from tests.device import INTERPRETED

BACKEND: Backend = CPU if INTERPRETED else choose("cuda")
NARROW: dict[str, dict[str, Any]] = {
    "retrieval": {"personal": 30, "trending": 20, "trending_per_group": 2, "followed": 8, "fresh": 10},
    "rank": {"max_limit": 60, "reserve": 6},
}
STATE = ReplyState(1, "m", Level.NONE, (), 0)


@pytest.fixture(autouse=True, scope="module")
def _few_views() -> Iterator[None]:
    """Each costs the interpreter time; how many there are changes no result."""
    with pytest.MonkeyPatch.context() as patch:
        for module in (device_views, device_batch):
            patch.setattr(module, "MAX_VIEWS", 6)
        yield


class Worlds:
    """The same streams on the host and on the device."""

    def __init__(self, streams: int, **sections: Any) -> None:
        catalogue = make_catalogue(streams, oldest_ms=1_200_000, seed=streams)
        changed = {**NARROW, **sections}
        self.on_host: Counter[str] = Counter()
        self.host: InProcess = fill_in_process(catalogue, **changed)
        self.device: InProcess = fill_in_process(
            catalogue, "exact_gpu", BACKEND, lambda reason, viewers: self.on_host.update({reason: viewers}), **changed
        )

    def rank(self, viewers: int, seed: int = 0) -> tuple[SlateBatch, SlateBatch]:
        """The batch's slates (host, device)."""
        return self.host.pipeline.rank(self.batch(self.host, viewers, seed)), self.device.pipeline.rank(
            self.batch(self.device, viewers, seed)
        )

    @staticmethod
    def batch(world: InProcess, viewers: int, seed: int = 0) -> QueryBatch:
        return world.batch(viewers, seed)


def assert_same_replies(worlds: Worlds, host: SlateBatch, device: SlateBatch) -> None:
    assert device.wire is not None, f"ranked on the host: {worlds.on_host}"
    np.testing.assert_array_equal(device.slots, host.slots)
    np.testing.assert_array_equal(device.counts, host.counts)
    shown = host.slots >= 0
    np.testing.assert_allclose(device.scores[shown], host.scores[shown], rtol=1e-5, atol=1e-6)
    np.testing.assert_array_equal(device.sources[shown], host.sources[shown])
    np.testing.assert_array_equal(device.exploration[shown], host.exploration[shown])
    for name in ("proposed", "served", "drops"):
        np.testing.assert_array_equal(getattr(device.tally, name), getattr(host.tally, name), err_msg=name)
    np.testing.assert_array_equal(device.tally.outcomes[1:], host.tally.outcomes[1:])
    assert (device.tally.excluded, device.tally.shown, device.tally.explored) == (
        host.tally.excluded, host.tally.shown, host.tally.explored,
    )  # fmt: skip
    # The device's bytes are what the host writes of the device's own slates.
    times = replace(device, times=host.times)
    again = encode_replies(replace(times, wire=None), STATE, worlds.device.table, 0.0)
    assert list(encode_replies(times, STATE, worlds.device.table, 0.0)) == list(again)


@pytest.mark.parametrize(("streams", "viewers"), [(90, 3), (40, 1)])
def test_slates_scores_tally_and_wire_bytes_are_those_of_the_host(streams: int, viewers: int) -> None:
    worlds = Worlds(streams)
    assert_same_replies(worlds, *worlds.rank(viewers))
    assert not worlds.on_host


@pytest.mark.parametrize("streams", [0, 1])
def test_an_empty_table_and_a_single_stream_are_ranked_too(streams: int) -> None:
    worlds = Worlds(streams)
    assert_same_replies(worlds, *worlds.rank(1))


def test_followed_excluded_and_filtered_requests_agree_within_one_batch() -> None:
    worlds = Worlds(60)
    found = []
    for world in (worlds.host, worlds.device):
        queries = [
            replace(query, followed_creator_ids=(f"creator-{i}", "creator-20"), exclude_stream_ids=("stream-0000003",))
            for i, query in enumerate(world.batch(4).requests)
        ]
        queries[1] = replace(queries[1], embedding=None, categories=("category-3",))
        queries[2] = replace(queries[2], languages=("xx",))  # a language that nobody speaks
        found.append(world.pipeline.rank(build_batch(queries, world.table, world.streams.book)))
    assert_same_replies(worlds, *found)
    assert found[0].counts[2] == 0 and found[0].tally.excluded > 0


def test_a_stream_that_goes_while_the_device_works_is_not_shown() -> None:
    worlds = Worlds(60)
    pipeline = worlds.device.pipeline
    started = pipeline.start(worlds.device.batch(1))  # type: ignore[attr-defined]
    first = pipeline.finish(pipeline.start(worlds.device.batch(1)))  # type: ignore[attr-defined]
    gone = int(first.slots[0, 0])
    worlds.device.table.columns.lease_expires_ms[gone] = worlds.device.clock.now_ms()
    slates = pipeline.finish(started)  # type: ignore[attr-defined]
    assert gone not in slates.slots and slates.counts[0] > 0
    assert worlds.on_host == {"changed": 1}


def test_what_does_not_fit_the_fixed_buffers_is_ranked_on_the_host_and_counted() -> None:
    worlds = Worlds(40)
    world = worlds.device
    many = tuple(f"stream-{i:07}" for i in range(300))
    queries = [replace(query, exclude_stream_ids=many) for query in world.batch(2).requests]
    slates = world.pipeline.rank(build_batch(queries, world.table, world.streams.book))
    assert slates.wire is None and slates.counts.sum() == 0
    assert worlds.on_host == {"widths": 2}


def test_a_new_tick_shows_new_scores_and_new_filters() -> None:
    worlds = Worlds(40)
    worlds.rank(1)
    for world in (worlds.host, worlds.device):
        rows = np.arange(world.table.rows, dtype=np.int32)
        world.streams.set_trend(rows, np.linspace(1, 0, len(rows), dtype=np.float32))
        world.pipeline.snapshot.trend_order = rows
        world.tick()
    assert_same_replies(worlds, *worlds.rank(1, seed=3))
