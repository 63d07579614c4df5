"""Compares the table with the media server's own list of live streams."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np

from kernels import fence
from kernels.idmap import pack_ids
from server.errors import Refused
from server.live.table import LiveTable, owner_of


@dataclass(frozen=True)
class Reconciliation:
    """absent: (stream_id, epoch) to end. unknown: places in the list of streams never started here."""

    confirmed: int
    absent: list[tuple[str, int]]
    unknown: list[int]


def find_absent(
    table: LiveTable, live_ids: list[bytes], as_of_ms: int, owners: Iterable[str] | None = None
) -> Reconciliation:
    """Open sessions that are not in the list and were not renewed since it was true.

    A proposal: their ends are applied later, through the log, and are conditional on the same comparison
    (`kernels/fence`), because a session may be renewed in between.

    Args:
        owners: only sessions that these producers began count; None: all.

    Raises:
        Refused: that would end more than the configured share of all open sessions.
    """
    settings, columns, rows = table.settings, table.columns, table.rows
    listed = table.map.lookup(*pack_ids(live_ids))
    in_list = np.zeros(rows, np.bool_)
    in_list[listed[listed >= 0]] = True
    state = columns.state[:rows]
    open_rows = (state == fence.LIVE) | (state == fence.SUSPECT)
    if owners is not None:
        open_rows &= np.isin(columns.owner[:rows], np.array([owner_of(name) for name in owners], np.uint64))
    proven_ms = columns.lease_expires_ms[:rows] - settings.lease_ms
    absent = np.flatnonzero(open_rows & ~in_list & (proven_ms <= as_of_ms))
    n_open = int(np.count_nonzero(open_rows))
    if len(absent) > max(settings.reconcile_always, settings.reconcile_max_share * n_open):
        raise Refused(
            f"live_stream_ids: would end {len(absent)} of {n_open} open streams; at most a share of "
            f"{settings.reconcile_max_share} is believed, so nothing was changed"
        )
    return Reconciliation(
        confirmed=int(np.count_nonzero(in_list & open_rows)),
        absent=[(table.stream_id(int(slot)), int(columns.epoch[slot])) for slot in absent],
        unknown=np.flatnonzero(listed < 0).tolist(),
    )
