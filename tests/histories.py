"""Small histories as files, for tests of the replay."""

from __future__ import annotations

import csv
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet

COLUMNS = (
    "t_folded_s", "t_abs_s", "event", "video_id", "channel", "org", "viewers", "likes", "likes_delta", "comments",
)  # fmt: skip
Row = dict[str, Any]


def row(t_s: int, event: str, video_id: str, viewers: int = 50, **more: Any) -> Row:
    """One row; ``event`` may be start, snapshot or end. ``more``: likes_delta, comments, channel, org …"""
    full = {"start": "live_start", "end": "live_end"}.get(event, event)
    given = {
        "t_folded_s": t_s, "t_abs_s": t_s + 1_000, "event": full, "video_id": video_id,
        "channel": f"channel of {video_id}", "org": "org", "viewers": viewers, "likes": 0, "likes_delta": 0,
        "comments": 0,
    }  # fmt: skip
    return {**given, **more}


def broadcast(video_id: str, begin_s: int, viewers: Sequence[int], **more: Any) -> list[Row]:
    """A whole stream: start, a snapshot a minute, end at the last of them."""
    snapshots = [row(begin_s + 60 * i, "snapshot", video_id, v, **more) for i, v in enumerate(viewers)]
    last_s = begin_s + 60 * (len(viewers) - 1)
    begin, end = row(begin_s, "start", video_id, viewers[0]), row(last_s, "end", video_id, viewers[-1])
    return [begin, *snapshots, end]


def in_time(rows: Sequence[Row]) -> list[Row]:
    """Sorted by time; rows of one moment keep their order."""
    return sorted(rows, key=lambda r: r["t_folded_s"])


def write_csv(path: Path, rows: Sequence[Row], columns: Sequence[str] = COLUMNS) -> Path:
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, columns, extrasaction="ignore")
        writer.writeheader()
        writer.writerows(rows)
    return path


def write_parquet(path: Path, rows: Sequence[Row], columns: Sequence[str] = COLUMNS) -> Path:
    pa.parquet.write_table(pa.table({name: [r[name] for r in rows] for name in columns}), path)
    return path
