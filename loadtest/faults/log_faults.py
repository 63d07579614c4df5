"""What becomes of the log, its snapshots and its disk: each on files of its own, so without the stage's traffic.

Here ``lost`` are streams whose start was acknowledged and which are not live afterwards, beyond those whose only
record the fault itself destroyed.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from pathlib import Path

import grpc
from liverank.v1 import ingest_pb2_grpc

from loadtest.faults.base import CannotPlay, Seen, scenario
from loadtest.faults.own_server import (
    WITHIN_S,
    OwnServer,
    fill_disk,
    flip,
    kill,
    live,
    metric,
    own_server,
    publish,
    rank,
    refused,
    settings_of,
    small_disk,
    starts,
    status,
    stream_id,
    tear,
    wait_for_metric,
)
from loadtest.faults.stage import Stage
from loadtest.processes import wait_for

BATCH, FEW = 100, 25
MOST_STREAMS = 19_000
ACK_TIMEOUT_MS = 3_000
"""Brokers that are there answer sooner, even on a busy machine."""
RARELY = {"every_ms": 600_000}


def demand(holds: object, told: str) -> None:
    """Raises AssertionError unless it holds, also under ``python -O``."""
    if not holds:
        raise AssertionError(told)


def kafka_sections(servers: str) -> dict[str, dict[str, object]]:
    """Sections of settings for the topic ``events`` at these brokers."""
    about = {"bootstrap_servers": servers, "topic": "events", "ack_timeout_ms": ACK_TIMEOUT_MS, "time_record_ms": 100}
    return {"log": {"kind": "kafka"}, "log.kafka": about, "log.kafka.options": {"fetch.wait.max.ms": "10"}}


@scenario("killed while a snapshot is written", traffic=False)
def killed_while_a_snapshot_is_written(stage: Stage) -> Seen:
    """kill -9 in the middle of the second snapshot: the first one and the log bring everything back."""
    with own_server(stage.own_folder("killed"), settings_of(stage.repository)) as own:
        server = own.start(snapshot={"every_ms": 1})
        snapshots = own.folder / "events.snapshots"
        with grpc.insecure_channel(server.address) as channel:
            firsts = range(0, MOST_STREAMS, FEW)
            for first, ack in zip(
                firsts, ingest_pb2_grpc.IngestStub(channel).Publish(starts(f, FEW) for f in firsts), strict=False
            ):
                demand(not ack.rejected, f"refused: {ack.rejected}")
                own.acknowledged += [stream_id(i) for i in range(first, first + FEW)]
                if _one_is_finished_and_the_next_begun(snapshots):
                    kill(server)
                    break
        count = len(own.acknowledged)
        demand(count < MOST_STREAMS, f"no second snapshot was being written within {count} streams")
        half = len(list(snapshots.glob("*.tmp")))
        recover_s = own.restarted(snapshot=RARELY)
        lost = own.lost()
        demand(not list(snapshots.glob("*.tmp")), "half a snapshot was left behind")
        assert own.server is not None
        demand(status(own.server).live >= count, "fewer live streams than were acknowledged")
        told = own.server.log.read_text().rsplit("recovered to", 1)[1].splitlines()[0]
        demand("snapshot of offset 0" not in told, f"the finished snapshot was not used: {told}")
        return Seen(
            None, recover_s, True, f"{count:,} acknowledged, {half} half-written file removed; recovered to{told}",
            lost=len(lost),
        )  # fmt: skip


def _one_is_finished_and_the_next_begun(snapshots: Path) -> bool:
    """Finished: of more than an empty table."""
    names = [Path(name) for name in os.listdir(snapshots)] if snapshots.exists() else []
    finished = any(name.suffix == ".snapshot" and int(name.stem) > 0 for name in names)
    return finished and any(name.suffix == ".tmp" for name in names)


def _five_records(own: OwnServer) -> None:
    """A server with five records of one stream each, every one durable."""
    own.start(snapshot=RARELY)
    own.publish_starts(1, 1, 1, 1, 1)


@scenario("last write to the log torn", traffic=False)
def last_write_torn(stage: Stage) -> Seen:
    """The last frame of the WAL is cut short, as by a power cut during a write: nobody had that record acknowledged."""
    with own_server(stage.own_folder("torn"), settings_of(stage.repository)) as own:
        _five_records(own)
        assert own.server is not None
        kill(own.server)
        tear(own.folder / "events.sqlite3-wal")
        torn = own.acknowledged.pop()
        recover_s = own.restarted(snapshot=RARELY)
        lost, half = own.lost(), live(own.server, [torn])
        ack = own.publish_starts(1)  # the torn stream again: its place in the log and its sequence are free
        demand(ack.offset == 5 and not ack.rejected, f"the next record should be 5: {ack}")
        return Seen(
            None, recover_s, not half,
            "record 5, whose write was torn before its acknowledgement, is not there; 1 to 4 are; the next is 5 again",
            lost=len(lost), shown_wrongly=len(half),
        )  # fmt: skip


@scenario("last record damaged on disk", traffic=False)
def last_record_damaged(stage: Stage) -> Seen:
    """One flipped byte in the newest record: it is removed and said to be, the rest is served."""
    with own_server(stage.own_folder("damaged"), settings_of(stage.repository)) as own:
        _five_records(own)
        assert own.server is not None
        demand(own.server.stop() == 0, "the server did not stop in order")
        flip(own.folder / "events.sqlite3", b"stream-00004")
        damaged = own.acknowledged.pop()
        recover_s = own.restarted(snapshot=RARELY)
        said = "record 5, the last one, is damaged (checksum differs) and was REMOVED" in own.server.log.read_text()
        counted = metric(own.server, "liverank_log_truncated_records_total") == 1
        demand(not live(own.server, [damaged]), "a damaged record was applied")
        return Seen(
            None, recover_s, said and counted,
            "the 1 record that the fault destroyed is removed: an error in the log names it, a metric counts it; "
            "the 4 others are there",
            lost=len(own.lost()),
        )  # fmt: skip


@scenario("newest snapshot corrupt", traffic=False)
def newest_snapshot_corrupt(stage: Stage) -> Seen:
    """It is skipped, set aside, counted and logged; the one before it and the log bring everything back."""
    with own_server(stage.own_folder("corrupt"), settings_of(stage.repository)) as own:
        server = own.start(snapshot={"every_ms": 20})
        for _ in range(2):
            ack = own.publish_starts(BATCH)
            wait_for_metric(server, "liverank_snapshot_offset", ack.offset)
        kill(server)
        snapshots = own.folder / "events.snapshots"
        newest, before = sorted(snapshots.glob("*.snapshot"), reverse=True)[:2]
        data = bytearray(newest.read_bytes())
        data[len(data) // 2] ^= 1
        newest.write_bytes(data)
        recover_s = own.restarted(snapshot=RARELY)
        assert own.server is not None
        said = own.server.log.read_text()
        disclosed = (
            f"SKIPPED a snapshot, an older one or the whole log is used: {newest}" in said
            and metric(own.server, 'liverank_snapshots_total{outcome="skipped"}') == 1
            and newest.with_suffix(".unusable").exists()
        )
        demand(f"snapshot of offset {int(before.stem)}, then" in said, "the snapshot before it was not used")
        return Seen(
            None, recover_s, disclosed,
            f"skipped, counted, set aside; from the snapshot of offset {int(before.stem)} and the log after it",
            lost=len(own.lost()),
        )  # fmt: skip


@scenario("disk full", traffic=False)
def disk_full(stage: Stage) -> Seen:
    """A real file system of 24 MiB: Publish is refused, ranking goes on, and all is well once there is space."""
    with (
        small_disk(stage.own_folder("disk")) as disk,
        own_server(disk, settings_of(stage.repository)) as own,
    ):
        server = own.start(snapshot={"every_ms": 100})
        own.publish_starts(200)
        wait_for(lambda: rank(server).streams, WITHIN_S, "streams are ranked")
        wait_for_metric(server, 'liverank_snapshots_total{outcome="written"}', 1)
        with own.probe() as probe:
            filler = fill_disk(disk)
            full_s = time.monotonic()
            code, details = refused(wait_for(lambda: _refusal(own), WITHIN_S, "Publish is refused"))
            refused_s = time.monotonic()
            demand(rank(server).streams, "ranking stopped")
            counted = metric(server, 'liverank_log_errors_total{reason="full"}') >= 1
            if len(own.acknowledged) > 200:  # there is something new for a snapshot
                wait_for_metric(server, 'liverank_snapshots_total{outcome="failed"}', 1)
                # The next try may be under way already; what is left behind stays.
                half = (disk / "events.snapshots").glob
                wait_for(lambda: not list(half("*.tmp")), WITHIN_S, "no half of a snapshot is left behind")
            filler.unlink()
            freed_s = time.monotonic()
            ack = own.publish_starts(200)
            recover_s = time.monotonic() - freed_s
            demand(ack.accepted == 200 and not ack.rejected, f"refused although there is space: {ack}")
            wait_for_metric(server, "liverank_snapshot_offset", ack.offset)
            ranked_on = not any(a.failed for a in probe.since(full_s))
            disclosed = code == "RESOURCE_EXHAUSTED" and "no space left" in details and counted
        kill(server)
        own.start()
        return Seen(
            refused_s - full_s, recover_s, disclosed and ranked_on and probe.discloses(full_s),
            f"Publish: {code}; ranking went on; snapshots again by themselves",
            lost=len(own.lost()),
        )  # fmt: skip


def _refusal(own: OwnServer) -> grpc.RpcError | None:
    """Of a batch of new streams; None when it was taken, into space that the log had reserved already."""
    try:
        own.publish_starts(200)
    except grpc.RpcError as error:
        return error
    return None


@scenario("Kafka brokers gone and back", traffic=False)
def kafka_brokers_gone_and_back(stage: Stage) -> Seen:
    """Publish is refused while they are away, ranking goes on; then a restart and a second server have everything."""
    try:
        from loadtest.faults.broker import running_broker
    except ImportError as error:
        raise CannotPlay(f"needs the package confluent-kafka: {error}") from error
    with running_broker("events") as broker:
        settings = {**settings_of(stage.repository), **kafka_sections(broker.servers)}
        with (
            own_server(stage.own_folder("kafka-a"), settings) as own,
            own_server(stage.own_folder("kafka-b"), settings) as other,
        ):
            server = own.start()
            own.publish_starts(10)
            with own.probe() as probe:
                broker.down()
                down_s = time.monotonic()
                again = starts(10, 10)
                try:
                    publish(server, again)
                    code, details = "OK", ""
                except grpc.RpcError as error:
                    code, details = refused(error)
                refused_s = time.monotonic()
                wait_for(lambda: rank(server).streams, WITHIN_S, "ranking goes on")
                broker.up()
                up_s = time.monotonic()
                # The first try may have arrived after all: then its events are repetitions.
                wait_for(_tried(lambda: publish(server, again)), WITHIN_S, "Publish works again")
                recover_s = time.monotonic() - up_s
                own.acknowledged += [stream_id(i) for i in range(10, 20)]
                ranked_on = not any(a.failed for a in probe.since(down_s)) and probe.discloses(down_s)
            kill(server)
            own.start()
            other.acknowledged = own.acknowledged
            other.start()
            lost = len(own.lost()) + len(other.lost())
            disclosed = code == "UNAVAILABLE" and "may or may not be in the log" in details
            return Seen(
                refused_s - down_s, recover_s, disclosed and ranked_on,
                f"Publish: {code} after the ack timeout of {ACK_TIMEOUT_MS / 1000:g} s; a restart and a second server "
                "have all 20 streams",
                lost=lost,
            )  # fmt: skip


def _tried(call: Callable[[], object]) -> Callable[[], object]:
    def attempt() -> object:
        try:
            return call()
        except grpc.RpcError:
            return None

    return attempt
