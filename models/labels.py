"""What models are to predict: the one place that defines labels, for both kinds of rows of `models.schema`.

**Impressions** (ranker). A viewer saw a stream at a place of a slate; what did that viewer do with *that* stream
within ``WINDOW_MS`` afterwards?

- ``clicked``: joined it within ``CLICK_WITHIN_MS``. The contract has no click of its own: opening a stream is `joined`.
  Two minutes, because a join after ten is more likely to come from a search or a notification.
- ``watch_s``: sum of `watched` seconds; ``watched``: at least ``WATCHED_S``. Half a minute tells a stay from a glance
  (a click alone rewards loud titles), the sum is what a model of expected time is fitted to.
- ``purchased``, ``purchase_value``: whether, and for how much (reference currency). Money is rare and heavy-tailed:
  one head for whether, one for how much.
- ``reported``: trust is spent here. A negative that silence is not.

An impression after which nothing of this happened is the negative, so there are no sampled ones. An event counts for
one impression: a join for the viewer's *last* one of the stream before it, the rest for the one that was joined from,
while its window lasts, else for the last. Who is shown a stream again while watching it does not watch because of that.

**Streams** (trendiness). Every live stream at a moment t; what did its crowd do in the next h of ``HORIZONS_MINUTES``?

- ``viewers``: the last reported count (a gauge; bots count) at t and at t + h; 0 when the session is over by then.
- ``engaged``: seconds watched, divided by the length of the window: the mean number of people whose players really
  ran, in (t - h, t] and in (t, t + h]. Bots do not watch.
- ``value``: purchases in reference currency, in the same two windows.

Of each, ``before`` and ``after``, and two growths, because each alone is won by the wrong streams: ``gain`` = after -
before (absolute; only ever won by the largest), and ``growth`` = gain / (before + prior) (relative; won by streams of
three viewers who become six, which the prior dampens). Five minutes: a recommendation made now still pays. Fifteen:
long enough for value, which comes in lumps. NaN: nobody has ever reported that kind of event to this log.

**Waiting for late labels.** Events may come late. Labels of a row are closed ``LATE_MS`` after its window, by the
stamps of the log; what comes later is not used. Rows that are not closed when the log ends are not
emitted: an open window would look like a negative.
"""

from __future__ import annotations

from typing import Any

from numpy.typing import NDArray

CLICK_WITHIN_MS = 120_000
WATCHED_S = 30.0
WINDOW_MS = 900_000
LATE_MS = 120_000
HORIZONS_MINUTES = (5, 15)
MEASURES = ("viewers", "engaged", "value")
PRIORS = {"viewers": 20.0, "engaged": 20.0, "value": 20.0}
"""Added to what is divided by in ``growth``: people, people, units of the reference currency."""


def growth(before: NDArray[Any], after: NDArray[Any], measure: str) -> tuple[NDArray[Any], NDArray[Any]]:
    """(gain, growth) of a measure, elementwise; NaN stays NaN. Raises KeyError for an unknown measure."""
    gain = after - before
    return gain, gain / (before + PRIORS[measure])


def definition(kind: str) -> dict[str, Any]:
    """The constants that a file's labels depend on; they stand in its metadata. kind: impressions or streams."""
    if kind == "impressions":
        return {
            "click_within_ms": CLICK_WITHIN_MS, "watched_s": WATCHED_S, "window_ms": WINDOW_MS, "late_ms": LATE_MS,
        }  # fmt: skip
    return {"horizons_minutes": list(HORIZONS_MINUTES), "priors": PRIORS, "late_ms": LATE_MS}


def stream_label_names() -> tuple[str, ...]:
    """``<measure>_<before|after|gain|growth>_<h>m`` in the order of columns."""
    return tuple(
        f"{measure}_{part}_{minutes}m"
        for minutes in HORIZONS_MINUTES
        for measure in MEASURES
        for part in ("before", "after", "gain", "growth")
    )
