"""What a replay says: a table for people and, last on stdout, one line of JSON for machines."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

from rich.console import Console
from rich.table import Table

from loadtest.replay.growth import TARGETS, Overlap
from loadtest.replay.player import Tally


@dataclass(frozen=True)
class Outcome:
    """Everything a replay found.

    rows, streams, sessions: of the file. seconds: wall time from the first batch to the last feed. feed: the
    server's overlap with the truth; formulas: name → theirs. short_feeds: bins in which the feed named fewer than
    ten candidates; what is missing counts as missed. faults: what was wrong with the server itself.
    """

    rows: int
    streams: int
    sessions: int
    seconds: float
    tally: Tally
    feed: Overlap
    formulas: dict[str, Overlap]
    short_feeds: int
    faults: tuple[str, ...]

    @property
    def sound(self) -> bool:
        return not (self.tally.shown_after_end or self.tally.lost or self.faults)

    def summary(self) -> dict[str, Any]:
        """The line of JSON. overlap10 and formulas: null where no bin counted."""
        tally = self.tally
        return {
            "peak_live": tally.peak_live,
            "events_per_s": round(tally.accepted / self.seconds) if self.seconds else 0,
            "shown_after_end": tally.shown_after_end,
            "overlap10": self.feed.means(),
            "formulas": {name: overlap.means() for name, overlap in self.formulas.items()},
            "bins": self.feed.bins,
            "short_feeds": self.short_feeds,
            "feeds": tally.feeds,
            "answered_by": dict(tally.answered_by),
            "rows": self.rows,
            "streams": self.streams,
            "sessions": self.sessions,
            "events": tally.events,
            "accepted": tally.accepted,
            "rejected": dict(tally.rejected),
            "lost": tally.lost,
            "faults": list(self.faults),
            "seconds": round(self.seconds, 2),
        }


def print_outcome(outcome: Outcome, console: Console | None = None) -> None:
    """Prints both to stdout."""
    console = console or Console(highlight=False)
    table = Table(title=f"overlap@10 with what really grew, 15 minutes later ({outcome.feed.bins} bins)")
    table.add_column("feed")
    for name in TARGETS:
        table.add_column(name.replace("_", " "), justify="right")
    models = ", ".join(outcome.tally.answered_by) or "no feed"
    for name, overlap in ((f"liverank ({models})", outcome.feed), *outcome.formulas.items()):
        means = overlap.means().values()
        table.add_row(name, *("-" if mean is None else f"{mean:.3f}" for mean in means))
    console.print(table)
    tally = outcome.tally
    console.print(
        f"{tally.accepted:,} of {tally.events:,} events accepted, {sum(tally.rejected.values()):,} rejected, "
        f"{tally.lost:,} lost; {tally.feeds:,} feeds, {tally.shown_after_end:,} places shown after an end; "
        f"at most {tally.peak_live:,} live",
        markup=False,
    )
    for fault in outcome.faults:
        console.print(f"fault: {fault}", markup=False)
    print(json.dumps(outcome.summary()), flush=True)
