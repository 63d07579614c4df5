"""What impressions say besides the times that a server keeps of them, in both forms of a batch."""

from __future__ import annotations

from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from liverank.v1 import ingest_pb2 as pb

from models.rows.details import Details, read_details
from server.live.events import decode_batch
from tests.arrow_events import payload, to_batch, to_ipc, to_rows
from tests.events import T0, batch, event, small_settings

SETTINGS = small_settings(max_events_per_batch=100)
TEXTS = ("viewer_id", "request_id", "model_version")
LARGE = {name: pa.large_utf8() for name in TEXTS}
PACKED = {name: pa.dictionary(pa.int8(), pa.utf8()) for name in TEXTS}
TEXT = st.text(max_size=8)
SEEN = st.fixed_dictionaries(
    {"served_ms": st.sampled_from([T0, 0]), "verify_by_ms": st.just(T0 + 5)},
    optional={
        "request_id": TEXT, "model_version": TEXT, "position": st.integers(0, (1 << 32) - 1),
        "propensity": st.floats(0, 1, width=32), "applied_offset": st.integers(0, (1 << 64) - 1),
    },
)  # fmt: skip
EVENTS = st.lists(
    st.one_of(
        st.builds(lambda viewer, seen: event("s", 1, epoch=1, viewer=viewer, impression=seen), TEXT, SEEN),
        st.just(event("s", 1, viewer="x", liked={})),
    ),
    max_size=6,
)


def details_of(sent: bytes) -> Details:
    events = decode_batch(sent, SETTINGS).events
    return read_details(sent, events.index[events.impressions])


@settings(max_examples=150, deadline=None)
@given(EVENTS, st.sampled_from([None, LARGE, PACKED]), st.booleans())
def test_the_details_are_those_of_the_accepted_impressions_in_both_forms(
    events: list[pb.Event], types: dict[str, Any] | None, sparse: bool
) -> None:
    kept = [one for one in events if one.HasField("impression") and one.impression.served_ms]
    for sent in (batch(*events), payload(to_ipc(to_batch(to_rows(events), types, sparse)))):
        found = details_of(sent)
        assert found.viewer_id == [one.viewer_id for one in kept]
        for name in ("request_id", "model_version", "position", "propensity", "applied_offset"):
            values = getattr(found, name)
            assert list(values) == [getattr(one.impression, name) for one in kept], name
        dtypes = (found.position.dtype, found.propensity.dtype, found.applied_offset.dtype)
        assert dtypes == (np.int64, np.float32, np.uint64)


@pytest.mark.parametrize("types", [None, LARGE, PACKED])
def test_null_is_not_known(types: dict[str, Any] | None) -> None:
    row = {"sequence": 1, "stream_id": "s", "epoch": 1, "event_time_ms": T0, "kind": "impression"}
    row |= {"served_ms": T0, "verify_by_ms": T0}
    found = details_of(payload(to_ipc(to_batch([row], types, sparse=False))))
    assert (found.viewer_id, found.request_id, found.model_version) == ([""], [""], [""])
    assert (found.position, found.propensity, found.applied_offset) == (0, 0.0, 0)
