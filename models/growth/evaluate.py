"""The recipe against every formula, on what came after all it learned from.

docs/evaluation.md says why it is done this way. The file's first 70 % of time is for training, the rest for testing. A
row is for training when its truth, 15 minutes later, lies in the first part too; for testing when its moment is after
the cut. So nothing tested was seen, though a stream that runs across the cut is on both sides, as it would be for a
server that was trained an hour ago.

Model and formulas order the same candidates at the same moments. Differences are taken moment by moment, and their
interval is from a bootstrap of blocks of 30 minutes.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from rich.console import Console
from rich.table import Table

from loadtest.replay.growth import AHEAD_S, MIN_CANDIDATES, TARGETS
from models.export import without_nan
from models.growth.metrics import BLOCK_MOMENTS, Quality, interval95, quality
from models.growth.rows import Rows
from server.errors import ConfigError

GROWTHS = ("absolute_growth", "relative_growth")
VIEWERS_SHARE = 0.95
"""Of what "viewers now" reaches on future viewers, the least that a model must."""


def split(rows: Rows, cut_s: int) -> tuple[Rows, Rows]:
    """(training, test) rows of a history whose first part ends at ``cut_s``."""
    return rows.take(rows.t_s + AHEAD_S <= cut_s), rows.take(rows.t_s > cut_s)


@dataclass(frozen=True)
class Difference:
    """Of one formula from the model, mean over moments, with its 95 % interval."""

    overlap10: float
    overlap10_ci95: tuple[float, float]
    ndcg10: float
    ndcg10_ci95: tuple[float, float]


@dataclass(frozen=True)
class Outcome:
    """What one evaluation found. Per target and name ("model" or a formula): mean quality over the moments that count;
    per target and formula: how far the model is above it."""

    moments: int
    means: dict[str, dict[str, dict[str, float]]]
    differences: dict[str, dict[str, Difference]]

    def best(self, target: str, metric: str) -> str:
        """The formula that is best there, on the test part itself: the hardest rival."""
        means = self.means[target]
        return max(self.differences[target], key=lambda name: means[name][metric])

    def holds(self) -> dict[str, bool]:
        """Whether the recipe does what it must, per target."""
        above = {
            target: all(d.overlap10_ci95[0] > 0 and d.ndcg10_ci95[0] > 0 for d in self.differences[target].values())
            for target in GROWTHS
        }
        model, now = self.means["viewers"]["model"], self.means["viewers"]["viewers_now"]
        return {"viewers": all(model[m] >= VIEWERS_SHARE * now[m] for m in model), **above}

    def summary(self) -> dict[str, Any]:
        """What the last line of output holds."""
        found: dict[str, Any] = {}
        holds = self.holds()
        for target in TARGETS:
            best, best_ndcg = self.best(target, "overlap10"), self.best(target, "ndcg10")
            of, of_ndcg = self.differences[target][best], self.differences[target][best_ndcg]
            found[target] = {
                "model": _rounded(self.means[target]["model"]),
                "best_formula": {"name": best, **_rounded(self.means[target][best])},
                "difference_ci95": [round(end, 4) for end in of.overlap10_ci95],
                "best_formula_ndcg10": {"name": best_ndcg, **_rounded(self.means[target][best_ndcg])},
                "difference_ndcg10_ci95": [round(end, 4) for end in of_ndcg.ndcg10_ci95],
                "holds": holds[target],
            }
        blocks = self.moments // BLOCK_MOMENTS
        found["test"] = {"moments": self.moments, "blocks": blocks, "block_minutes": BLOCK_MOMENTS}
        return without_nan(found)


def compare(rows: Rows, scores: NDArray[np.float32]) -> Outcome:
    """Scores float32[n, TARGETS] of rows against every formula.

    Raises:
        ConfigError: no moment of the rows counts.
    """
    known = np.isfinite(rows.then)
    _, moment, sizes = np.unique(rows.t_s[known], return_inverse=True, return_counts=True)
    counts = sizes >= MIN_CANDIDATES
    if not counts.any():
        raise ConfigError(
            f"--events: the test part has no minute with {MIN_CANDIDATES} candidates, at most {sizes.max(initial=0)}"
        )
    chosen = np.flatnonzero(known)[counts[moment]]
    _, moment = np.unique(rows.t_s[chosen], return_inverse=True)
    means: dict[str, dict[str, dict[str, float]]] = {}
    differences: dict[str, dict[str, Difference]] = {}
    for at, (target, values) in enumerate(rows.targets().items()):
        truth = values[chosen]
        model = quality(scores[chosen, at], truth, moment)
        rivals = {name: quality(score[chosen], truth, moment) for name, score in rows.formulas.items()}
        means[target] = {name: _means(of) for name, of in (("model", model), *rivals.items())}
        differences[target] = {name: _difference(model, of) for name, of in rivals.items()}
    return Outcome(int(counts.sum()), means, differences)


def print_outcome(outcome: Outcome, title: str, facts: Mapping[str, Any], console: Console | None = None) -> None:
    """Prints a table per target and, last, one line of JSON that ``facts`` are added to."""
    console = console or Console(highlight=False)
    console.print(title, markup=False)
    for target in TARGETS:
        table = Table(title=f"{target.replace('_', ' ')}, 15 minutes later ({outcome.moments} minutes)")
        for column in ("", "overlap@10", "model is above by", "NDCG@10", "model is above by"):
            table.add_column(column, justify="right" if column else "left")
        means = outcome.means[target]
        for name in sorted(means, key=lambda name: -means[name]["overlap10"]):
            of, d = means[name], outcome.differences[target].get(name)
            table.add_row(
                name,
                f"{of['overlap10']:.3f}",
                _shown(d.overlap10, d.overlap10_ci95) if d else "",
                f"{of['ndcg10']:.3f}",
                _shown(d.ndcg10, d.ndcg10_ci95) if d else "",
            )
        console.print(table)
    for target, fine in outcome.holds().items():
        wanted = f"{VIEWERS_SHARE:.0%} of viewers now" if target == "viewers" else "above every formula, surely"
        console.print(f"{target}: {wanted}: {'yes' if fine else 'no'}", markup=False)
    print(json.dumps({**outcome.summary(), **without_nan(facts)}, allow_nan=False), flush=True)


def _means(of: Quality) -> dict[str, float]:
    return {"overlap10": float(of.overlap10.mean()), "ndcg10": float(of.ndcg10.mean())}


def _difference(model: Quality, formula: Quality) -> Difference:
    overlap, ndcg = model.overlap10 - formula.overlap10, model.ndcg10 - formula.ndcg10
    return Difference(float(overlap.mean()), interval95(overlap), float(ndcg.mean()), interval95(ndcg))


def _rounded(means: Mapping[str, float]) -> dict[str, float]:
    return {name: round(value, 4) for name, value in means.items()}


def _shown(mean: float, ends: tuple[float, float]) -> str:
    if not np.isfinite(ends).all():
        return f"{mean:+.3f} (too few minutes for an interval)"
    return f"{mean:+.3f} ({ends[0]:+.3f} to {ends[1]:+.3f})"
