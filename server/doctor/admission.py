"""Settings that decide who is served under load, and contradict each other."""

from __future__ import annotations

from collections.abc import Iterator

from server.doctor.base import Context, Finding, ok, warn


def admission(context: Context) -> Iterator[Finding]:
    """Whether the targets of [admission] can be met at all by what [serve] and [rank] allow."""
    told, serve, rank = context.settings.admission, context.settings.serve, context.settings.rank
    contradictions = {
        f"target_wait_ms ({told.target_wait_ms}) is not below target_ms ({told.target_ms}): requests that wait as long "
        "as the limit aims for miss the target": told.target_wait_ms >= told.target_ms,
        f"min_limit ({told.min_limit}) is not below serve.max_rank_calls ({serve.max_rank_calls}): the limit can never "
        "fall, so nothing keeps the wait at its target": told.min_limit >= serve.max_rank_calls,
        f"min_limit ({told.min_limit}) is above serve.max_queue_rows ({serve.max_queue_rows}): what is always let in "
        "is turned away by the queue": told.min_limit > serve.max_queue_rows,
        f"serve.batch_window_us ({serve.batch_window_us}) is longer than target_wait_ms ({told.target_wait_ms}): "
        "filling a batch alone exceeds the wait": serve.batch_window_us > 1000 * told.target_wait_ms,
        f"rank.min_budget_ms ({rank.min_budget_ms}) is not below target_ms ({told.target_ms}): callers with the "
        "target as their deadline get the popular list": rank.min_budget_ms >= told.target_ms,
    }
    found = [what for what, holds in contradictions.items() if holds]
    for what in found:
        yield warn("admission.targets", what, "Change one of the two; docs/overload.md says what each is for.")
    if not found:
        yield ok("admission.targets", f"{told.target_percentile:g} % within {told.target_ms} ms, no contradiction")
