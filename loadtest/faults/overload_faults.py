"""Ten times the load that a server can serve; see loadtest/bench/overload.py for how it is offered."""

from __future__ import annotations

from typing import Any

from loadtest.bench.overload import measure
from loadtest.faults.base import Seen, scenario
from loadtest.faults.stage import Stage

SLOWEST_PROBE_MS = 2_000


@scenario("overload", traffic=False)
def overload(stage: Stage) -> Seen:
    """Excess is shed with a hint when to come back, accepted requests are answered in time, nobody else notices."""
    told = measure(stage.own_folder("overload"), stage.flood)
    if found := faults_of(told):
        raise AssertionError(f"{'; '.join(found)}: {told}")
    return Seen(
        None, told["recovered_s"], told["shed_with_hint"] == told["shed"],
        f"{told['offered_factor']}x the peak of {told['peak_rps']:.0f}/s for {stage.flood.seconds:g} s: "
        f"goodput {told['goodput_share']:.2f} of peak, {told['shed']:,} shed with a hint, accepted p99 "
        f"{told['accepted_p99_ms']:.0f} ms",
    )  # fmt: skip


def faults_of(told: dict[str, Any]) -> list[str]:
    """What was not as it should be in the figures of a flood."""
    probes_ms = {name: told[f"{name}_max_ms"] for name in ("check_live", "health", "publish")}
    demands = {
        "the generator did not overload the server at all": told["offered_factor"] > 1.5,
        "next to nothing was shed": told["shed"] > 100,
        "shed without a hint": told["shed_with_hint"] == told["shed"],
        "calls failed otherwise": told["other_errors"] == 0 and told["errors"] == {} and told["peak_errors"] == {},
        # A server that queues without end answers a few per cent in time.
        "goodput collapsed": told["goodput_share"] > 0.3,
        "accepted requests were answered late": told["accepted_p50_ms"] < told["slo_ms"],
        "shed before quality went down, or replies do not say so": told["degraded_share"] > 0.9,
        "liveness, health or ingest failed": told["probe_errors"] == {} and told["probe_calls"] > 10,
        f"liveness, health or ingest slow: {probes_ms}": max(probes_ms.values()) < SLOWEST_PROBE_MS,
        "not as before afterwards": told["recovered_s"] is not None,
    }
    return [what for what, holds in demands.items() if not holds]
