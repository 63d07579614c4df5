"""A histogram that takes the values of a whole batch at once."""

from __future__ import annotations

import threading
from bisect import bisect_left
from collections.abc import Iterable, Sequence
from itertools import accumulate

from prometheus_client import CollectorRegistry
from prometheus_client.core import HistogramMetricFamily
from prometheus_client.registry import Collector


class Bins:
    """The values of one set of labels. Thread-safe."""

    def __init__(self, bounds: Sequence[float]) -> None:
        self._bounds, self._lock = bounds, threading.Lock()
        self._counts, self._sum = [0] * (len(bounds) + 1), 0.0

    def observe(self, value: float) -> None:
        """Counts one value."""
        self.observe_all((value,))

    def observe_all(self, values: Sequence[float]) -> None:
        """Counts values; a bound belongs to the bin below it."""
        bounds, counts = self._bounds, self._counts
        with self._lock:
            for value in values:
                counts[bisect_left(bounds, value)] += 1
            self._sum += sum(values)

    def cumulated(self) -> tuple[list[int], float]:
        """How many values are up to each bound, the last one infinite; and the sum of all."""
        with self._lock:
            return list(accumulate(self._counts)), self._sum


class Distribution(Collector):
    """Looks like `prometheus_client.Histogram`, whose `observe` costs microseconds per value: here they are paid once
    per batch.

    Args:
        buckets: upper bounds, ascending, without infinity.
    """

    def __init__(
        self,
        name: str,
        documentation: str,
        labelnames: Sequence[str] = (),
        *,
        buckets: Sequence[float],
        registry: CollectorRegistry,
    ) -> None:
        self._name, self._documentation, self._labelnames = name, documentation, tuple(labelnames)
        self._bounds, self._lock = tuple(map(float, buckets)), threading.Lock()
        self._bins: dict[tuple[str, ...], Bins] = {} if labelnames else {(): Bins(self._bounds)}
        registry.register(self)

    def labels(self, *values: str) -> Bins:
        """Those of one set of labels."""
        if len(values) != len(self._labelnames):
            raise ValueError(f"{self._name}: labels {self._labelnames} wanted, got {values}")
        with self._lock:
            return self._bins.setdefault(values, Bins(self._bounds))

    def observe(self, value: float) -> None:
        """Counts one value, where there are no labels."""
        self.labels().observe(value)

    def observe_all(self, values: Sequence[float]) -> None:
        """Counts values, where there are no labels."""
        self.labels().observe_all(values)

    def describe(self) -> Iterable[HistogramMetricFamily]:
        return [HistogramMetricFamily(self._name, self._documentation, labels=self._labelnames)]

    def collect(self) -> Iterable[HistogramMetricFamily]:
        (family,) = self.describe()
        with self._lock:
            bins = list(self._bins.items())
        bounds = [*map(repr, self._bounds), "+Inf"]
        for values, one in bins:
            counts, total = one.cumulated()
            family.add_metric(values, [*zip(bounds, counts, strict=True)], total)
        return [family]
