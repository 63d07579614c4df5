"""Histograms fed by batches show what prometheus_client's own show."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st
from prometheus_client import CollectorRegistry, Histogram

from server.telemetry.distribution import Distribution

BOUNDS = (0.1, 0.5, 1.0)


def samples(registry: CollectorRegistry) -> dict[tuple[str, tuple[tuple[str, str], ...]], float]:
    return {
        (sample.name, tuple(sorted(sample.labels.items()))): sample.value
        for family in registry.collect()
        for sample in family.samples
        if not sample.name.endswith("_created")
    }


@given(st.lists(st.lists(st.sampled_from([0.0, 0.1, 0.2, 0.5, 1.0, 7.0]), max_size=5), max_size=5))
def test_batches_count_like_single_values(batches: list[list[float]]) -> None:
    ours, theirs = CollectorRegistry(), CollectorRegistry()
    plain = Distribution("d", "text", buckets=BOUNDS, registry=ours)
    labelled = Distribution("l", "text", ["stage"], buckets=BOUNDS, registry=ours)
    plain_h = Histogram("d", "text", buckets=BOUNDS, registry=theirs)
    labelled_h = Histogram("l", "text", ["stage"], buckets=BOUNDS, registry=theirs)
    for i, values in enumerate(batches):
        plain.observe_all(values)
        labelled.labels(str(i % 2)).observe_all(values)
        child = labelled_h.labels(str(i % 2))
        for value in values:
            plain_h.observe(value)
            child.observe(value)
    assert samples(ours) == pytest.approx(samples(theirs))


def test_a_missing_label_is_named() -> None:
    labelled = Distribution("l", "text", ["stage"], buckets=BOUNDS, registry=CollectorRegistry())
    with pytest.raises(ValueError, match="stage"):
        labelled.observe(1.0)
