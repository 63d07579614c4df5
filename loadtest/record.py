"""A log to train on, made quickly: a simulated platform and its viewers against a real server, on the world's clock.

    python -m loadtest.record --out liverank-data --minutes 60 --requests-per-s 5
    liverank replay --log liverank-data --config liverank-data/liverank.toml --rows impressions --out rows.parquet

The server's own ranking fills the slates (formula, or the configured model), its own log keeps what happened, and
viewers behave by `loadtest.world.viewing`, so whatever a model finds in the log can be held against the truth. Seeded:
the same settings give the same events, but for the time stamps within a step that the order of threads may change.
"""

from __future__ import annotations

import argparse
import json
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import grpc
import numpy as np
from liverank.v1 import ingest_pb2, ingest_pb2_grpc, ranking_pb2, ranking_pb2_grpc

from loadtest.processes import to_toml
from loadtest.world import Viewer, World, WorldSettings
from loadtest.world.feedback import Feedback
from server.app import App
from server.clock import ManualClock
from server.config import Settings, load_settings
from server.errors import ConfigError
from server.log.sqlite import SqliteLog

YEAR_MS = 365 * 24 * 3_600_000
KEPT_RECORDS = 1 << 40
"""A log that is trained on must not be trimmed."""
REFRESH_MS = 10_000
VIEWERS_PER_CALL = 256
SHUFFLED = "shuffled-"


@dataclass(frozen=True)
class RecordSettings:
    """requests_per_s: of the platform's viewers. places: what their screens show. people: distinct viewers who ask.

    shuffled: share of the slates shown in an order of chance; their request ids begin with ``SHUFFLED``.
    """

    minutes: int = 60
    requests_per_s: float = 5.0
    places: int = 20
    people: int = 2_000
    shuffled: float = 0.1
    surface: str = ""


@dataclass(frozen=True)
class Recorded:
    """What is in the log now."""

    records: int
    events: int
    refused: dict[str, int]
    replies: int
    impressions: int


def record(
    folder: Path, world_settings: WorldSettings, settings: RecordSettings, base: Settings, say: Callable[[str], None]
) -> Recorded:
    """Plays a world against a server of its own that keeps its log in ``folder``.

    Raises:
        ConfigError: ``folder`` holds a log already, or the settings are wrong. grpc.RpcError: the server failed.
    """
    path = folder / "events.sqlite3"
    if path.exists():
        raise ConfigError(f"--out: {path} is there already")
    world = World(world_settings)
    clock = ManualClock(world.now_ms)
    used = recording_settings(base, world_settings, path, settings.places)
    folder.mkdir(parents=True, exist_ok=True)
    kept = used.table.model_dump(include={"capacity", "embedding_dim", "lease_ms", "max_future_ms"})
    (folder / "liverank.toml").write_text(to_toml({"table": kept}))  # what a replay of the log must be told
    app = App(used, clock, lambda: None)
    try:
        app.start()
        with grpc.insecure_channel(f"127.0.0.1:{app.port}", [("grpc.max_receive_message_length", 64 << 20)]) as channel:
            counted = _Play(app, clock, world, settings, channel).play(say)
    finally:
        app.drain()
    log = SqliteLog(path, read_only=True)
    try:
        last = log.last
    finally:
        log.close()
    return Recorded(0 if last is None else last.offset, *counted)


def recording_settings(base: Settings, world: WorldSettings, path: Path, places: int) -> Settings:
    """A loopback server on the world's clock, with a table that never runs out, and a log that keeps everything."""
    turnover = world.target_live * 900_000 / world.mean_session_ms
    table = base.table.model_copy(
        update={
            "capacity": 1_000 + 3 * world.target_live + int(4 * turnover),
            "embedding_dim": world.embedding_dim,
            "lease_ms": max(base.table.lease_ms, 4 * max(world.heartbeat_ms, world.step_ms)),
            "max_future_ms": max(base.table.max_future_ms, 2 * world.step_ms),
        }
    )
    rank, serve = base.rank, base.serve
    return base.model_copy(
        update={
            "serve": serve.model_copy(update={"host": "127.0.0.1", "port": 0, "metrics_port": 0}),
            "table": table,
            "log": base.log.model_copy(update={"kind": "sqlite", "path": path, "retain_records": KEPT_RECORDS}),
            "snapshot": base.snapshot.model_copy(update={"path": None, "every_ms": YEAR_MS}),
            "scoring": base.scoring.model_copy(update={"refresh_ms": YEAR_MS}),
            "rank": rank.model_copy(update={"tick_ms": YEAR_MS, "max_limit": max(places, rank.max_limit)}),
        }
    )


class _Play:
    """One run. Requests of a step are asked at its end, all at the same moment of the world."""

    def __init__(
        self, app: App, clock: ManualClock, world: World, settings: RecordSettings, channel: grpc.Channel
    ) -> None:
        self._app, self._clock, self._world, self._settings = app, clock, world, settings
        self._rng = np.random.default_rng([world.settings.seed, 9])
        numbers = np.unique(world.sample_viewers(settings.people, self._rng))
        self._people = [world.viewer(int(number)) for number in numbers]
        self._feedback = Feedback(world.viewing, world.streams, settings.places)
        self._ranking = ranking_pb2_grpc.RankingStub(channel)
        self._outbox: list[ingest_pb2.EventBatch] = []
        self._more = threading.Semaphore(0)
        self._acks = ingest_pb2_grpc.IngestStub(channel).Publish(self._sent())
        self._events = self._replies = 0
        self._refused: Counter[str] = Counter()

    def play(self, say: Callable[[str], None]) -> tuple[int, dict[str, int], int, int]:
        """(events applied, refused by code, replies, impressions)."""
        step_ms, next_refresh_ms, owed = self._world.settings.step_ms, 0, 0.0
        for step in range(self._settings.minutes * 60_000 // step_ms):
            batches = self._world.step().to_batches() + self._feedback.due(self._world.now_ms)
            self._clock.set(self._world.now_ms)
            for batch in batches:
                self._publish(batch)
            if self._world.now_ms >= next_refresh_ms:
                self._app.engine.call(self._app.engine.refresh_now).result()
                next_refresh_ms = self._world.now_ms + REFRESH_MS
            owed += self._settings.requests_per_s * step_ms / 1000
            self._ask(int(owed))
            owed -= int(owed)
            if (step + 1) * step_ms % 600_000 < step_ms:
                say(f"minute {(step + 1) * step_ms // 60_000}: {self._feedback.impressions} impressions")
        self._outbox.clear()
        self._more.release()
        return self._events, dict(self._refused), self._replies, self._feedback.impressions

    def _sent(self) -> Iterator[ingest_pb2.EventBatch]:
        while True:
            self._more.acquire()
            if not self._outbox:
                return
            yield self._outbox.pop()

    def _publish(self, batch: ingest_pb2.EventBatch) -> None:
        self._outbox.append(batch)
        self._more.release()
        ack = next(self._acks)
        self._events += ack.accepted
        self._refused.update(ingest_pb2.RejectCode.Name(r.code) for r in ack.rejected)

    def _ask(self, n: int) -> None:
        """n viewers, some of whom come often, ask at once and look at what they get."""
        people = [self._people[i] for i in (self._rng.random(n) ** 2 * len(self._people)).astype(np.int64)]
        for first in range(0, n, VIEWERS_PER_CALL):
            some = people[first : first + VIEWERS_PER_CALL]
            shuffled = self._rng.random(len(some)) < self._settings.shuffled
            names = [f"{SHUFFLED if mix else 'r-'}{self._replies + i}" for i, mix in enumerate(shuffled)]
            requests = [self._request(name, person) for name, person in zip(names, some)]
            replies = self._ranking.RankBatch(ranking_pb2.RankBatchRequest(requests=requests), timeout=60.0)
            self._replies += len(some)
            for person, reply, mix in zip(some, replies.responses, shuffled, strict=True):
                self._feedback.seen(person, reply, self._rng, shuffled=bool(mix))

    def _request(self, name: str, person: Viewer) -> ranking_pb2.RankRequest:
        return ranking_pb2.RankRequest(
            request_id=name,
            viewer_id=person.viewer_id,
            viewer_embedding=person.embedding,
            region=person.region,
            followed_creator_ids=person.followed,
            limit=self._settings.places,
            surface=self._settings.surface,
        )


def main(arguments: list[str] | None = None) -> int:
    """See the module."""
    parser = argparse.ArgumentParser(prog="python -m loadtest.record", description="Records a simulated log.")
    parser.add_argument("--out", type=Path, required=True, help="folder for events.sqlite3")
    parser.add_argument("--minutes", type=int, default=RecordSettings.minutes, help="of the world's clock")
    parser.add_argument("--requests-per-s", type=float, default=RecordSettings.requests_per_s)
    parser.add_argument("--places", type=int, default=RecordSettings.places, help="of a viewer's screen")
    parser.add_argument("--people", type=int, default=RecordSettings.people, help="distinct viewers who ask")
    parser.add_argument("--shuffled", type=float, default=RecordSettings.shuffled, help="share of slates by chance")
    parser.add_argument("--streams", type=int, default=300, help="live at once")
    parser.add_argument("--seed", type=int, default=7)
    parser.add_argument("--config", type=Path, help="settings file (TOML) of the server")
    given = parser.parse_args(arguments)
    world = WorldSettings(
        seed=given.seed, target_live=given.streams, step_ms=2_000, n_creators=max(20_000, 4 * given.streams)
    )
    settings = RecordSettings(given.minutes, given.requests_per_s, given.places, given.people, given.shuffled)
    began_s = time.monotonic()
    try:
        done = record(given.out, world, settings, load_settings(given.config), print)
    except ConfigError as error:
        print(f"record: {error}", file=sys.stderr)
        return 2
    print(json.dumps({**done.__dict__, "seconds": round(time.monotonic() - began_s, 1)}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
