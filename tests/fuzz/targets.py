"""Everything that reads bytes from outside: what may come in, and which errors it may raise on purpose.

A new decoder is one function with ``@target``. It takes any bytes; an exception that is not one of the target's
deliberate errors is a fault.
"""

from __future__ import annotations

import atexit
import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path

import numpy as np
import pyarrow as pa
from liverank.v1 import ingest_pb2, liveness_pb2, ranking_pb2

from kernels.idmap import ID_BYTES, hash_ids, pack_ids
from loadtest.replay.reader import read_history
from models.rows.details import read_details
from server.config import ROOT, load_settings, parse_settings
from server.errors import (
    BadScores,
    ConfigError,
    InvalidRequest,
    LiverankError,
    SchemaMismatch,
    SnapshotError,
    Unauthenticated,
)
from server.live.arrow_events import decode_arrow, decode_by_row
from server.live.arrow_schema import read_batch
from server.live.ends import EndFeed
from server.live.event_checks import KINDS
from server.live.events import DecodedBatch, Marks, decode_batch, decode_by_message
from server.live.features import FeatureSet
from server.live.state import StateBuffer, restore
from server.live.table import End
from server.log import snapshot
from server.log.snapshot import Contents, SnapshotFolder, manifest_of
from server.rollout.state import Rollout
from server.rollout.store import FORMAT, RolloutFile
from server.rpc.auth import parser_of
from server.rpc.decode import check_stream_id, decode_rank
from server.rpc.liveness import checked_ids
from server.rules.rulebook import RuleBook
from server.scoring.model_config import check_config, parse_config
from server.scoring.ranker_config import check_ranker_config
from server.security.access import AccessList
from server.security.gate import bearer
from server.security.tokens import hash_token
from tests.arrow_events import payload, to_batch, to_ipc, to_rows
from tests.events import T0, batch, event, new_table, small_settings, started
from tests.histories import broadcast, write_csv, write_parquet

CORPUS = Path(__file__).parent / "corpus"
SETTINGS = parse_settings({"table": {"capacity": 8, "embedding_dim": 4, "max_events_per_batch": 50}})
TABLE = small_settings(capacity=8, max_events_per_batch=50)
SURFACES = ("default", "chart")
TOKEN = "a." + "x" * 43
MAX_BYTES, COLUMNAR_BYTES = 4_096, 16_384


@dataclass(frozen=True)
class Target:
    """A decoder. run: raises on a fault and only then. seeds: well-formed inputs to begin with. max_bytes: of an
    input; longer ones are cut."""

    name: str
    decode: Callable[[bytes], object]
    allowed: tuple[type[LiverankError], ...]
    make_seeds: Callable[[], list[bytes]] = field(repr=False)
    max_bytes: int = MAX_BYTES

    def run(self, data: bytes) -> bool:
        """Whether ``data`` was accepted."""
        try:
            self.decode(data)
        except self.allowed:
            return False
        return True

    def seeds(self) -> list[bytes]:
        """Well-formed inputs, and everything in the target's folder of the corpus, in a fixed order."""
        files = sorted((CORPUS / self.name).glob("*"))
        return [*self.make_seeds(), *(file.read_bytes() for file in files)]


TARGETS: dict[str, Target] = {}


def target(
    seeds: Callable[[], list[bytes]], *allowed: type[LiverankError], max_bytes: int = MAX_BYTES
) -> Callable[[Callable[[bytes], object]], Callable[[bytes], object]]:
    def register(decode: Callable[[bytes], object]) -> Callable[[bytes], object]:
        TARGETS[decode.__name__] = Target(decode.__name__, decode, allowed, seeds, max_bytes)
        return decode

    return register


# --- off the wire --------------------------------------------------------------------------------


def _rank_request() -> ranking_pb2.RankRequest:
    return ranking_pb2.RankRequest(
        request_id="r", viewer_id="v", viewer_embedding=[1, 0, 0, 0.5], surface="chart", limit=5, languages=["en"],
        categories=["x"], region="DE", followed_creator_ids=["c"], exclude_stream_ids=["s"], min_offset=1,
    )  # fmt: skip


@target(lambda: [b"", _rank_request().SerializeToString()], InvalidRequest)
def rank(data: bytes) -> object:
    return decode_rank(parser_of(ranking_pb2.RankRequest.FromString)(data), SETTINGS, SURFACES, 1.0)


@target(lambda: [b"", ranking_pb2.RankBatchRequest(requests=[_rank_request()] * 2).SerializeToString()], InvalidRequest)
def rank_batch(data: bytes) -> object:
    message = parser_of(ranking_pb2.RankBatchRequest.FromString)(data)
    return [decode_rank(one, SETTINGS, SURFACES, 1.0, f"requests[{i}].") for i, one in enumerate(message.requests)]


@target(
    lambda: [liveness_pb2.CheckLiveRequest(streams=[liveness_pb2.StreamRef(stream_id="s")]).SerializeToString()],
    InvalidRequest,
)
def check_live(data: bytes) -> object:
    message = parser_of(liveness_pb2.CheckLiveRequest.FromString)(data)
    for i, stream in enumerate(message.streams):
        check_stream_id(f"streams[{i}].stream_id", stream.stream_id)
    return message


@target(
    lambda: [liveness_pb2.ReconcileRequest(live_stream_ids=["s", "t"], as_of_ms=T0, source="m").SerializeToString()],
    InvalidRequest,
)
def reconcile(data: bytes) -> object:
    return checked_ids(parser_of(liveness_pb2.ReconcileRequest.FromString)(data), TABLE, T0)


def _events() -> list[ingest_pb2.Event]:
    money = {"amount_minor": 250, "currency": "USD"}
    return [
        started("s", 1, embedding=[1.0, 0.0, 0.0, 0.0], tags=["t"], language="en", age_rating=18),
        event("s", 2, epoch=1, heartbeat={"media_sequence": 9}),
        event("s", 3, viewer="v", watched={"seconds": 3.5}), event("s", 4, bid=money), event("s", 5, purchased=money),
        event("s", 6, moderated={"action": 1}), event("s", 7, viewer="v", chatted={"count": 3}),
        event("s", 8, viewer_count={"count": 7}), event("s", 9, reported={"reason": "x"}),
        event("s", 10, epoch=1, impression={"request_id": "r", "served_ms": T0, "verify_by_ms": T0 + 5}),
        event("s", 11, epoch=1, viewer="v", impression={
            "served_ms": T0, "verify_by_ms": T0 + 5, "position": 2, "propensity": 0.25, "model_version": "m/1",
            "applied_offset": 1 << 40,
        }),
        event("s", 12, epoch=1, ended={"reason": "creator"}),
    ]  # fmt: skip


def _event_batches() -> list[bytes]:
    events = _events()
    whole = ingest_pb2.EventBatch(producer_id="p", events=events)
    owned = ingest_pb2.EventBatch(producer_id="p", events=events[:2], own_streams_only=True, max_streams=1)
    return [whole.SerializeToString(), owned.SerializeToString()]


def _assert_detailed(data: bytes, decoded: DecodedBatch) -> None:
    """The second look at a record finds the impressions that the first kept."""
    kept = decoded.events.impressions
    details = read_details(data, decoded.events.index[kept])
    viewers = hash_ids(*pack_ids([viewer.encode() for viewer in details.viewer_id]))
    assert np.array_equal(viewers, decoded.events.viewer_hash[kept]), "another event's details"
    assert ((details.propensity >= 0) & (details.propensity <= 1)).all(), "a propensity that nobody checked"
    assert all(len(version.encode()) <= ID_BYTES for version in details.model_version)


@target(_event_batches, InvalidRequest)
def event_batch(data: bytes) -> object:
    try:
        told = decode_by_message(data, TABLE)
    except InvalidRequest:
        told = None
    try:
        decoded = decode_batch(data, TABLE)
    except InvalidRequest:
        assert told is None, "the generated classes accept it"
        raise
    assert told is not None, "the generated classes refuse it"
    assert decoded.rejected == told.rejected, "the generated classes refuse other events"
    assert np.array_equal(decoded.events.value, told.events.value) and np.array_equal(
        decoded.events.ids, told.events.ids
    )
    places = sorted([*decoded.events.index.tolist(), *(r.index for r in decoded.rejected)])
    assert places == list(range(len(places))), "every event is accounted for, once"
    _assert_detailed(data, decoded)
    return decoded


@target(_event_batches, InvalidRequest)
def event_batch_applied(data: bytes) -> object:
    """Twice: what a resend meets is another table than what the first meets."""
    table = new_table(TABLE)
    for at_ms in (T0, T0 + 700_000):
        table.apply(decode_batch(data, TABLE).events, at_ms)
        assert np.isfinite(table.columns.embedding).all() and np.isfinite(table.columns.counters).all()
    return table


def _arrow_batches() -> list[bytes]:
    rows = to_rows(_events())
    plain = {"kind": pa.int8(), "stream_id": pa.dictionary(pa.int32(), pa.large_utf8())}
    numbered = [{**row, "kind": KINDS[row["kind"]]} for row in rows]
    embedding = {"embedding": pa.list_(pa.float32(), 4), "tags": pa.large_list(pa.utf8())}
    return [
        to_ipc(to_batch(rows)),
        to_ipc(to_batch(numbered[1:6], plain)),
        to_ipc(to_batch(rows[:1], embedding)),
    ]


@target(_arrow_batches, InvalidRequest, max_bytes=COLUMNAR_BYTES)
def arrow_batch(data: bytes) -> object:
    """Bare, so that changes hit the columns and not the message around them."""
    decoded = decode_arrow(Marks("p"), data, TABLE)
    told = decode_by_row(Marks("p"), read_batch(data, TABLE.max_events_per_batch), TABLE)
    assert decoded.rejected == told.rejected, "row by row other events are refused"
    assert np.array_equal(decoded.events.value, told.events.value) and np.array_equal(
        decoded.events.ids, told.events.ids
    )
    places = sorted([*decoded.events.index.tolist(), *(r.index for r in decoded.rejected)])
    assert places == list(range(len(places))), "every row is accounted for, once"
    _assert_detailed(payload(data), decoded)
    return decoded


@target(_arrow_batches, InvalidRequest, max_bytes=COLUMNAR_BYTES)
def arrow_batch_applied(data: bytes) -> object:
    """As `event_batch_applied`."""
    table = new_table(TABLE)
    for at_ms in (T0, T0 + 700_000):
        table.apply(
            decode_batch(payload(data), TABLE).events if data else decode_arrow(Marks("p"), data, TABLE).events, at_ms
        )
        assert np.isfinite(table.columns.embedding).all() and np.isfinite(table.columns.counters).all()
    return table


# --- files ---------------------------------------------------------------------------------------


@cache
def _folder() -> Path:
    folder = tempfile.mkdtemp(prefix="liverank-fuzz-", dir="/dev/shm" if os.access("/dev/shm", os.W_OK) else None)
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return Path(folder)


def _as_file(name: str, data: bytes) -> Path:
    path = _folder() / f"{os.getpid()}-{name}"
    path.write_bytes(data)
    return path


def _snapshots() -> list[bytes]:
    """What stands between the head and the checksum of a snapshot file."""
    seeds = []
    for events in ([], _events()):
        table = new_table(TABLE)
        table.apply(decode_batch(batch(*events), TABLE).events, T0)
        state = StateBuffer().capture(table)
        about = manifest_of(
            state, offset=7, stamp_ms=T0, record_crc=1, table_ms=T0, log="sqlite", feature_schema="f", ends_newest=1
        )
        file = SnapshotFolder(_folder() / f"{os.getpid()}-seeds").write(Contents(about, state, [End("s", 1, T0, "r")]))
        seeds.append(file.read_bytes()[len(snapshot.HEAD) : -snapshot.DIGEST_BYTES])
    return seeds


@target(_snapshots, SnapshotError, max_bytes=COLUMNAR_BYTES)
def snapshot_file(data: bytes) -> object:
    """Sealed again, or nothing but the checksum would ever be met; then put into a table, if it fits."""
    digest = hashlib.blake2b(snapshot.HEAD + data, digest_size=snapshot.DIGEST_BYTES).digest()
    folder = _folder() / str(os.getpid())
    folder.mkdir(exist_ok=True)
    path = folder / f"{7:020d}{snapshot.SUFFIX}"
    path.write_bytes(snapshot.HEAD + data + digest)
    contents = snapshot.read(path)
    if contents.state.rows <= TABLE.capacity and contents.manifest.embedding_dim == TABLE.embedding_dim:
        table = new_table(TABLE)
        restore(table, contents.state)
        EndFeed(16).restore(contents.manifest.ends_newest, contents.ends)
        table.apply(decode_batch(batch(*_events()), TABLE).events, T0 + 1_000)
    return contents


@target(lambda: [(ROOT / "rules" / "default.toml").read_bytes()], ConfigError)
def rules(data: bytes) -> object:
    return RuleBook.load(_as_file("rules.toml", data), _features().names)


@cache
def _features() -> FeatureSet:
    return FeatureSet.load(SETTINGS.table.features_file)


@target(lambda: [SETTINGS.table.features_file.read_bytes()], ConfigError)
def features(data: bytes) -> object:
    return FeatureSet.load(_as_file("features.toml", data))


@target(
    lambda: [b'[serve]\nport = 0\n[table]\nlease_ms = 9\n[security]\naccess_file = "a"\n[table.currencies]\nX = 1.0\n'],
    ConfigError,
)
def config(data: bytes) -> object:
    return load_settings(_as_file("liverank.toml", data))


@target(
    lambda: [
        b'[token.a]\nhashes = ["sha256:' + b"0" * 32 + b":" + b"0" * 64 + b'"]\nroles = ["reader"]\n'
        b'expires = 2030-01-01T00:00:00Z\n[certificate."x.y"]\nroles = ["admin"]\nproducer_ids = ["*"]\n'
    ],
    ConfigError,
)
def access(data: bytes) -> object:
    return AccessList.parse(data, "access.toml")


@cache
def _access_list() -> AccessList:
    return AccessList.parse(f'[token.a]\nhashes = ["{hash_token(TOKEN)}"]\nroles = ["reader"]'.encode(), "access.toml")


@target(lambda: [b"Bearer " + TOKEN.encode(), b"Basic x"], Unauthenticated)
def authorization(data: bytes) -> object:
    return _access_list().identify(bearer(data.decode("latin-1")), (), T0)


def _histories() -> tuple[list[bytes], list[bytes]]:
    rows = broadcast("a", 0, [3, 5, 8], likes_delta=2, comments=4)
    rows = sorted([*rows, *broadcast("b", 60, [9, 1])], key=lambda row: row["t_folded_s"])
    csv, parquet = _folder() / f"{os.getpid()}-seed.csv", _folder() / f"{os.getpid()}-seed.parquet"
    return [write_csv(csv, rows).read_bytes()], [write_parquet(parquet, rows).read_bytes()]


@target(lambda: _histories()[0], ConfigError)
def history_csv(data: bytes) -> object:
    return read_history(_as_file("history.csv", data))


@target(lambda: _histories()[1], ConfigError)
def history_parquet(data: bytes) -> object:
    return read_history(_as_file("history.parquet", data if data[:4] == b"PAR1" else b"PAR1" + data[4:]))


@target(lambda: [(ROOT.parent / "model_repository/trendiness/config.pbtxt").read_bytes()], SchemaMismatch, BadScores)
def model_config(data: bytes) -> object:
    return check_config(parse_config(data.decode("latin-1")), "trendiness", _features().schema, len(_features()))


@target(lambda: [(ROOT.parent / "model_repository/ranker/config.pbtxt").read_bytes()], SchemaMismatch, BadScores)
def ranker_config(data: bytes) -> object:
    config, dim = parse_config(data.decode("latin-1")), load_settings(None).table.embedding_dim
    return check_ranker_config(config, "ranker", _features().schema, len(_features()), dim)


def _rollouts() -> list[bytes]:
    trial = Rollout(serving=2, previous=1).pushed(3, T0)
    return [
        json.dumps({"format": FORMAT, "models": {"trendiness": one.to_dict()}}).encode() for one in (Rollout(), trial)
    ]


@target(_rollouts, ConfigError)
def rollout_file(data: bytes) -> object:
    return RolloutFile(_as_file("rollout.json", data)).load()
