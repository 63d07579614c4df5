"""The same traffic for long: memory must be bounded, and nothing may creep."""

from __future__ import annotations

import threading
import time

import numpy as np

from loadtest.faults.base import Seen, scenario
from loadtest.faults.stage import Stage
from loadtest.processes import rss_bytes

SAMPLE_S = 0.25
SETTLED_SHARE = 0.4
"""The first part of a soak is left out of the slope: caches and rings fill."""
MOST_MIB_PER_MINUTE = 2.0
"""A leak that fills 1 GiB within a working day. Judged only over a minute or more: shorter is noise."""
MOST_MIB = 96.0
MIB = 1 << 20


def slope_per_minute(at_s: list[float], values: list[float]) -> float:
    """Least squares over the settled part, per minute; 0 for fewer than two points."""
    first = int(len(at_s) * SETTLED_SHARE)
    if len(at_s) - first < 2:
        return 0.0
    return float(np.polyfit(np.array(at_s[first:]) - at_s[first], values[first:], 1)[0] * 60)


@scenario("soak")
def soak(stage: Stage) -> Seen:
    """Traffic for ``stage.soak_s``. Raises AssertionError when memory grows beyond the bounds above."""
    at_s, mib = [], []
    pause = threading.Event()
    with stage.probe() as probe:
        begun_s = time.monotonic()
        while time.monotonic() - begun_s < stage.soak_s:
            at_s.append(time.monotonic() - begun_s)
            mib.append(rss_bytes(stage.server.process.pid) / MIB)
            pause.wait(SAMPLE_S)
        slope, grown = slope_per_minute(at_s, mib), mib[-1] - mib[0]
        told = f"{at_s[-1]:.0f} s: {mib[0]:.0f} to {mib[-1]:.0f} MiB, slope {slope:+.2f} MiB/min"
        if grown > MOST_MIB or (stage.soak_s >= 60 and slope > MOST_MIB_PER_MINUTE):
            raise AssertionError(f"memory is not bounded: {told}")
        unusual = [a for a in probe.since(begun_s) if a.level != "NONE"]
        return Seen(unusual[0].at_s - begun_s if unusual else None, None, probe.discloses(begun_s), told)
