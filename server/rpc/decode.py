"""Requests off the wire: checked field by field, then handed on without protobuf."""

from __future__ import annotations

import math
import time
from collections.abc import Collection
from typing import Any

import numpy as np
from numpy.typing import NDArray

from kernels.idmap import ID_BYTES
from kernels.unit import to_unit
from server.config import Settings
from server.errors import InvalidRequest
from server.live.event_checks import length_problem
from server.retrieval.query import RankQuery

MAX_NAMES = 1_000
MAX_FILTERS = 64


def decode_rank(
    request: Any, settings: Settings, surfaces: Collection[str] | None, deadline_s: float, where: str = ""
) -> RankQuery:
    """Checks a RankRequest.

    Args:
        surfaces: names that are allowed; None: it is checked elsewhere.
        deadline_s: monotonic time by which the caller wants the answer.
        where: prefix for field names in errors, such as ``requests[3].``.

    Raises:
        InvalidRequest: names the field and what is allowed.
    """
    request_id, viewer_id, region = request.request_id, request.viewer_id, request.region
    surface = request.surface or "default"
    if len(request_id) + len(viewer_id) + len(region) + len(surface) > ID_BYTES // 4:  # 4 bytes at most per character
        for name in ("request_id", "viewer_id", "region", "surface"):
            check_short(where + name, getattr(request, name))
    if surfaces is not None and surface not in surfaces:
        raise InvalidRequest(f"{where}surface", f"one of {', '.join(sorted(surfaces))} wanted, got {surface!r}")
    limit = request.limit or settings.rank.default_limit
    return RankQuery(
        request_id=request_id,
        viewer_id=viewer_id,
        embedding=_embedding(request, settings.table.embedding_dim, where),
        surface=surface,
        limit=min(limit, settings.rank.max_limit),
        limit_clamped=limit > settings.rank.max_limit,
        languages=_names(where, "languages", request.languages, MAX_FILTERS),
        categories=_names(where, "categories", request.categories, MAX_FILTERS),
        region=region,
        followed_creator_ids=_names(where, "followed_creator_ids", request.followed_creator_ids, MAX_NAMES),
        exclude_stream_ids=_names(where, "exclude_stream_ids", request.exclude_stream_ids, MAX_NAMES),
        min_offset=request.min_offset,
        deadline_s=deadline_s,
        received_s=time.monotonic(),
    )


def check_stream_id(field: str, stream_id: str) -> None:
    """Raises InvalidRequest unless it is 1 to 64 bytes."""
    if not 1 <= len(stream_id.encode()) <= ID_BYTES:
        raise InvalidRequest(field, f"1 to {ID_BYTES} bytes wanted, got {len(stream_id.encode())}")


def _embedding(request: Any, dim: int, where: str) -> NDArray[np.float32] | None:
    """The viewer's embedding at unit length, float32[D]; None when not given (or all zero)."""
    values = request.viewer_embedding
    if not values:
        return None
    if len(values) != dim:
        raise InvalidRequest(f"{where}viewer_embedding", f"0 or {dim} floats wanted, got {len(values)}")
    embedding = np.fromiter(values, np.float32, dim)
    norm = to_unit(embedding)
    if not math.isfinite(norm):
        raise InvalidRequest(f"{where}viewer_embedding", "finite floats wanted, got NaN or infinity")
    if problem := length_problem(norm):
        raise InvalidRequest(f"{where}viewer_embedding", problem)
    return embedding


def _names(where: str, field: str, names: Any, most: int) -> tuple[str, ...]:
    if not names:
        return ()
    if len(names) > most:
        raise InvalidRequest(where + field, f"at most {most} allowed, got {len(names)}")
    for i, name in enumerate(names):
        if len(name) > ID_BYTES // 4:  # 4 bytes at most per character
            check_short(f"{where}{field}[{i}]", name)
    return tuple(names)


def check_short(field: str, value: str, most_bytes: int = ID_BYTES) -> None:
    """Raises InvalidRequest when ``value`` takes more than ``most_bytes``."""
    if len(value) > most_bytes // 4 and len(value.encode()) > most_bytes:  # 4 bytes at most per character
        raise InvalidRequest(field, f"at most {most_bytes} bytes allowed, got {len(value.encode())}")
