"""What impressions say beyond what a server needs of them: read from the record once more, by those who ask.

The record was decoded before, hence checked; the server's decoder keeps only the times of an impression.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
from liverank.v1 import ingest_pb2 as pb
from numpy.typing import NDArray


@dataclass(frozen=True)
class Details:
    """Who saw n streams, and what the replies that served them said.

    viewer_id, request_id, model_version: n texts. position int64[n]: 1-based place in the slate, 0 not known.
    propensity float32[n]: that of exploration, 0 on its score. applied_offset uint64[n]: of the table that ranked it,
    0 not known.
    """

    viewer_id: list[str]
    request_id: list[str]
    model_version: list[str]
    position: NDArray[np.int64]
    propensity: NDArray[np.float32]
    applied_offset: NDArray[np.uint64]


_DEFAULTS: dict[str, Any] = {
    "viewer_id": "", "request_id": "", "model_version": "", "position": 0, "propensity": 0.0, "applied_offset": 0,
}  # fmt: skip


def read_details(payload: bytes, places: NDArray[np.int32]) -> Details:
    """What some impressions of a record say.

    Args:
        payload: of a record that `server.live.events.decode_batch` has decoded. places: int32[n], theirs in the batch
            (`EventColumns.index`).
    """
    batch = pb.EventBatch.FromString(payload)
    if batch.arrow:
        said = _of_columns(batch.arrow, places)
    else:
        said = _of_messages(batch.events[place] for place in places.tolist())
    return Details(
        said["viewer_id"],
        said["request_id"],
        said["model_version"],
        np.array(said["position"], np.int64),
        np.array(said["propensity"], np.float32),
        np.array(said["applied_offset"], np.uint64),
    )


def _of_messages(events: Iterable[Any]) -> dict[str, list[Any]]:
    said: dict[str, list[Any]] = {name: [] for name in _DEFAULTS}
    for event in events:
        for name, values in said.items():
            values.append(getattr(event if name == "viewer_id" else event.impression, name))
    return said


def _of_columns(ipc: bytes, places: NDArray[np.int32]) -> dict[str, list[Any]]:
    """Null and missing are the default of the field."""
    with pa.ipc.open_stream(ipc) as stream:
        batch = stream.read_next_batch()
    said: dict[str, list[Any]] = {}
    for name, default in _DEFAULTS.items():
        said[name] = [default] * len(places)
        if name in batch.schema.names:
            found = batch.column(name).take(pa.array(places)).to_pylist()
            said[name] = [default if value is None else value for value in found]
    return said
