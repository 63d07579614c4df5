"""What one step of the world emits, as columns, and the same as protobuf batches."""

from __future__ import annotations

from dataclasses import dataclass, fields
from enum import IntEnum
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    from liverank.v1 import ingest_pb2

    from loadtest.world.streams import StreamColumns

END_REASONS = ("creator", "encoder_lost")
REPORT_REASONS = ("spam", "counterfeit", "fraud", "harassment")


class EventKind(IntEnum):
    """The payload of an event; the number is the field's number in ``liverank.v1.Event``."""

    STARTED = 10
    HEARTBEAT = 11
    ENDED = 12
    VIEWER_COUNT = 13
    JOINED = 14
    LEFT = 15
    WATCHED = 16
    CHATTED = 17
    LIKED = 18
    FOLLOWED = 19
    SHARED = 20
    BID = 21
    PURCHASED = 22
    REPORTED = 23
    MODERATED = 24


def viewer_name(number: int) -> str:
    """The viewer_id of viewer ``number``; empty for −1, nobody."""
    return f"viewer-{number:07d}" if number >= 0 else ""


@dataclass(frozen=True, slots=True)
class WorldEvents:
    """Events in the order of delivery: producer after producer, as each sends one batch per step.

    ``value`` is, by kind: media_sequence (HEARTBEAT), count (VIEWER_COUNT and interactions),
    seconds (WATCHED), amount_minor (BID, PURCHASED), Moderated.Action (MODERATED); else 0. All but
    seconds are whole and below 2**53. ``detail`` indexes END_REASONS or REPORT_REASONS; else 0.
    """

    now_ms: int  # the world's clock at delivery
    streams: StreamColumns  # what the indices in ``stream`` mean
    producer_ids: tuple[str, ...]
    producer: NDArray[np.int16]  # [E] into producer_ids
    sequence: NDArray[np.uint64]  # [E]
    stream: NDArray[np.int32]  # [E] row of ``streams``
    epoch: NDArray[np.int64]  # [E] 0: the current session
    event_time_ms: NDArray[np.int64]  # [E]
    kind: NDArray[np.int8]  # [E] EventKind
    viewer: NDArray[np.int64]  # [E] −1: no viewer's action
    value: NDArray[np.float64]  # [E]
    detail: NDArray[np.int8]  # [E]

    def __len__(self) -> int:
        return len(self.kind)

    def equals(self, other: WorldEvents) -> bool:
        """Whether both hold the same events in the same order."""
        return self.now_ms == other.now_ms and all(
            np.array_equal(getattr(self, name), getattr(other, name)) for name in COLUMN_DTYPES
        )

    def to_batches(self, max_events: int = 10_000) -> list[ingest_pb2.EventBatch]:
        """The same events as messages of one producer each, at most ``max_events`` in one.

        To be published in the order given. Costs a few microseconds per event; the columns cost nothing.
        """
        # Imported here so that training needs no generated code.
        from loadtest.world.wire import to_batches

        return to_batches(self, max_events)


COLUMN_DTYPES: dict[str, type[np.generic]] = {
    "producer": np.int16,
    "sequence": np.uint64,
    "stream": np.int32,
    "epoch": np.int64,
    "event_time_ms": np.int64,
    "kind": np.int8,
    "viewer": np.int64,
    "value": np.float64,
    "detail": np.int8,
}
assert set(COLUMN_DTYPES) < {f.name for f in fields(WorldEvents)}

# Delay of an event that is sent and never arrives.
LOST = -1


class Outbox:
    """Events emitted during one step, before they get sequences: blocks of columns, joined at the end."""

    # ``delay_ms`` is known here only where the world decides it (ends); UNDECIDED is left to Delivery.
    UNDECIDED = -2

    def __init__(self) -> None:
        self._blocks: list[dict[str, NDArray[Any]]] = []

    def add(
        self,
        kind: EventKind,
        producer: NDArray[np.integer[Any]],
        stream: NDArray[np.int32],
        event_time_ms: NDArray[np.int64],
        *,
        epoch: NDArray[np.int64] | int = 0,
        viewer: NDArray[np.int64] | int = -1,
        value: NDArray[Any] | float = 0.0,
        detail: NDArray[np.integer[Any]] | int = 0,
        delay_ms: NDArray[np.int64] | int = UNDECIDED,
    ) -> None:
        """Appends one block; all arrays are [E], scalars hold for all of it."""
        n = len(stream)
        if n == 0:
            return
        given = {
            "producer": producer, "stream": stream, "epoch": epoch, "event_time_ms": event_time_ms,
            "kind": int(kind), "viewer": viewer, "value": value, "detail": detail, "delay_ms": delay_ms,
        }  # fmt: skip
        self._blocks.append(
            {
                name: np.broadcast_to(np.asarray(column, COLUMN_DTYPES.get(name, np.int64)), n)
                for name, column in given.items()
            }
        )

    def take(self) -> dict[str, NDArray[Any]] | None:
        """All blocks joined (columns of WorldEvents but sequence, and delay_ms), or None; empties the box."""
        blocks, self._blocks = self._blocks, []
        if not blocks:
            return None
        return {name: np.concatenate([b[name] for b in blocks]) for name in blocks[0]}
