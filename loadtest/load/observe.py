"""The server from outside while a load runs: its Prometheus metrics, and its process where it is ours."""

from __future__ import annotations

import itertools
import threading
import time
import urllib.request
from collections import defaultdict
from typing import Any

from prometheus_client.parser import text_string_to_metric_families

from loadtest.processes import cpu_seconds, rss_bytes

EVERY_S = 2.0
_TIMEOUT_S = 2.0
STAGES = "liverank_stage_seconds"
OTHERS = {
    "rank": "liverank_rank_seconds", "apply": "liverank_apply_seconds", "tick": "liverank_tick_seconds",
    "model": "liverank_model_seconds",
}  # fmt: skip
Sums = dict[str, tuple[float, float]]
"""stage → (seconds, times) so far."""


def stage_sums(exposition: str) -> Sums:
    """Sums and counts of the server's histograms of time, from the text of its metrics page.

    Raises:
        ValueError: it is no Prometheus exposition, or not a liverank server's.
    """
    seconds: dict[str, float] = defaultdict(float)
    times: dict[str, float] = defaultdict(float)
    names = {metric: name for name, metric in OTHERS.items()}
    for family in text_string_to_metric_families(exposition):
        if family.name != STAGES and family.name not in names:
            continue
        for sample in family.samples:
            stage = sample.labels.get("stage", "") if family.name == STAGES else names[family.name]
            if sample.name.endswith("_sum"):
                seconds[stage] += sample.value
            elif sample.name.endswith("_count"):
                times[stage] += sample.value
    if not seconds:
        raise ValueError(f"no {STAGES} and no {OTHERS['rank']} among its metrics")
    return {stage: (seconds[stage], times[stage]) for stage in seconds}


def stage_means(before: Sums, after: Sums) -> dict[str, float | None]:
    """Mean milliseconds per stage between two readings; None where it did not run, or the server was restarted."""
    found: dict[str, float | None] = {}
    for stage, (seconds, times) in after.items():
        was_s, was = before.get(stage, (0.0, 0.0))
        found[stage] = (seconds - was_s) / (times - was) * 1000 if times > was else None
    return found


class Observer:
    """A thread that reads metrics and process every two seconds.

    Args:
        metrics: HOST:PORT of the server's metrics; "" reads none.
        pid: the server's process on this machine; None: unknown.

    Attributes:
        why_not: why there are no stages; "" when there are.
    """

    def __init__(self, metrics: str, pid: int | None, every_s: float = EVERY_S) -> None:
        self.why_not = "" if metrics else "no metrics address was given"
        self._metrics, self._pid, self._every_s = metrics, pid, every_s
        self._sums: list[tuple[float, Sums]] = []
        self._process: list[tuple[float, float, int]] = []  # t, cpu_s, rss
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="observer", daemon=True)
        self._begun_s = 0.0

    def start(self, begun_s: float) -> None:
        self._begun_s = begun_s
        self._thread.start()

    def stop(self) -> None:
        self._stop.set()
        self._thread.join(self._every_s + _TIMEOUT_S + 5.0)

    def stages(self) -> dict[str, Any]:
        """{"t_s": […], "mean_ms": {stage: […]}, "whole_ms": {stage: mean}} or {"missing": why}."""
        if len(self._sums) < 2:
            return {"missing": self.why_not or "read less than twice"}
        pairs = list(itertools.pairwise(self._sums))
        names = sorted(self._sums[-1][1])
        means = [stage_means(before, after) for (_, before), (_, after) in pairs]
        whole = stage_means(self._sums[0][1], self._sums[-1][1])
        return {
            "t_s": [round((a + b) / 2, 2) for (a, _), (b, _) in pairs],
            "mean_ms": {name: [_rounded(mean.get(name)) for mean in means] for name in names},
            "whole_ms": {name: _rounded(whole[name]) for name in names},
        }

    def process(self) -> dict[str, Any]:
        """{"t_s": […], "cpu_cores": […], "rss_mb": […]} or {"missing": why}."""
        if len(self._process) < 2:
            return {"missing": "the server's process is not ours to look at"}
        pairs = list(itertools.pairwise(self._process))
        return {
            "t_s": [round(b[0], 2) for _, b in pairs],
            "cpu_cores": [round((b[1] - a[1]) / max(b[0] - a[0], 1e-6), 3) for a, b in pairs],
            "rss_mb": [round(b[2] / 1e6, 2) for _, b in pairs],
        }

    def _run(self) -> None:
        while True:
            self._read()
            if self._stop.wait(self._every_s):
                self._read()
                return

    def _read(self) -> None:
        t_s = time.monotonic() - self._begun_s
        if self._pid is not None:
            try:
                self._process.append((t_s, cpu_seconds(self._pid), rss_bytes(self._pid)))
            except OSError:
                self._pid = None  # it is gone; the calls' errors say so
        if not self._metrics or self.why_not:
            return
        try:
            with urllib.request.urlopen(f"http://{self._metrics}/metrics", timeout=_TIMEOUT_S) as page:
                self._sums.append((t_s, stage_sums(page.read().decode())))
        except (OSError, ValueError) as error:
            self.why_not = f"{self._metrics}: {error}"


def _rounded(value: float | None) -> float | None:
    return None if value is None else round(value, 4)
