"""Is it still live? The answer for single streams, from the newest table."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from kernels import fence
from kernels.idmap import pack_ids
from server.clock import Clock
from server.live.table import LiveTable
from server.retrieval.streams import StreamState
from server.rules.bits import built_in

STATE_NAMES = {fence.FREE: "UNKNOWN", fence.LIVE: "LIVE", fence.SUSPECT: "SUSPECT", fence.ENDED: "ENDED"}


@dataclass(frozen=True)
class Status:
    """See LiveStatus in liveness.proto. state: 0 unknown, else a row state."""

    stream_id: str
    state: int
    showable: bool
    epoch: int
    verify_by_ms: int
    reason: str


def check_live(
    table: LiveTable, streams: StreamState, clock: Clock, wanted: list[tuple[str, int]]
) -> tuple[list[Status], int]:
    """Statuses of (stream_id, epoch) pairs (epoch 0: any) and the time they hold for, ms."""
    now_ms = clock.now_ms()
    slots = table.map.lookup(*pack_ids([stream_id.encode() for stream_id, _ in wanted]))
    return [
        _status(table, streams, now_ms, stream_id, epoch, int(slot))
        for (stream_id, epoch), slot in zip(wanted, slots, strict=True)
    ], now_ms


def first_reason(table: LiveTable, streams: StreamState, slot: int, now_ms: int) -> str:
    """Why a row may not be shown to anybody, or "". Unknown counts as not showable."""
    columns = table.columns
    if columns.state[slot] == fence.ENDED:
        return "ended"
    if columns.state[slot] != fence.LIVE or columns.lease_expires_ms[slot] <= now_ms:
        return "lease_expired"
    at = np.array([slot], np.int32)
    bits = int(streams.rule_bits[slot] | built_in(columns, at, now_ms)[0]) & streams.book.exclude_bits
    for i, name in enumerate(streams.book.names):
        if bits >> i & 1:
            return f"rule:{name}"
    return ""


def _status(table: LiveTable, streams: StreamState, now_ms: int, stream_id: str, epoch: int, slot: int) -> Status:
    if slot < 0:
        return Status(stream_id, 0, False, 0, 0, "unknown")
    columns = table.columns
    state, current = int(columns.state[slot]), int(columns.epoch[slot])
    if state == fence.LIVE and columns.lease_expires_ms[slot] <= now_ms:
        state = fence.SUSPECT  # the next tick will say so too
    reason = first_reason(table, streams, slot, now_ms)
    if not reason and epoch not in (0, current):
        reason = "epoch_changed"
    verify_by_ms = 0 if reason else int(columns.lease_expires_ms[slot])
    return Status(stream_id, state, not reason, current, verify_by_ms, reason)
