"""The simple scores that a model has to beat, from the same reports at the same moments."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from loadtest.replay.growth import AHEAD_S, MIN_VIEWERS, Reports

MASTODON_THRESHOLD = 5.0
MASTODON_HALF_LIFE_S = 4 * 3600.0
EWMA_HALF_LIFE_S = 300.0
LIKES_WINDOW_S = 300
REDDIT_SECONDS_PER_DECADE = 45_000.0
NEED_LIKES = ("likes_per_viewer", "hacker_news", "reddit_hot")


class Formulas:
    """Scores of all sessions at one bin after the other; call ``scores`` once per bin, in order of time.

    - ``viewers_now``: current popularity.
    - ``viewers_change_15m``: viewers now - viewers 15 min ago (0 before the stream began).
    - ``likes_per_viewer``: likes of the last 5 min / viewers now.
    - ``mastodon``: surprise (o - e)² / e, 0 if o < 5 or o <= e; the highest so far is kept and halves every 4 h.
      Mastodon compares accounts today (o) with yesterday (e, at least 1); on this time scale o is viewers now and
      e is viewers 15 min ago. Source: mastodon/mastodon, app/models/trends/tags.rb.
    - ``hacker_news``: (points - 1)^0.8 / ((age_min + 120) / 60)^1.8; points are likes so far. Source: the published
      ``frontpage-rank`` of news.arc, with its gravity 1.8 and 120 minutes.
    - ``reddit_hot``: log10(max(|s|, 1)) + t / 45000; s is likes so far, t the begin in seconds. Source: reddit,
      r2/r2/lib/db/_sorts.pyx.
    - ``ewma_growth``: EWMA x (1 + growth). EWMA: mean of reported viewers, half-life 5 min; growth: its change over
      15 min per its value then (at least 20, the candidates' floor, so that a new stream has a finite growth).

    The three that need likes are left out when the file has none.
    """

    def __init__(self, reports: Reports, has_likes: bool) -> None:
        self._reports = reports
        self._ewma = ewma(reports, EWMA_HALF_LIFE_S)
        self._peak = np.zeros(len(reports.sessions.stream))
        self._peak_s = np.zeros(len(reports.sessions.stream))
        self._has_likes = has_likes

    def scores(self, t_s: int) -> dict[str, NDArray[np.float64]]:
        """Name → float64[S], finite; sessions that are not readable at ``t_s`` have meaningless scores."""
        r = self._reports
        now, before = r.last(t_s), r.last(t_s - AHEAD_S)
        viewers, earlier = r.value(r.viewers, now), r.value(r.viewers, before)
        smooth, smooth_before = r.value(self._ewma, now), r.value(self._ewma, before)
        likes = r.value(r.likes, now)
        recent = likes - r.value(r.likes, r.last(t_s - LIKES_WINDOW_S))
        # What has not begun yet would have a negative age; nobody reads its score.
        age_min = np.maximum(t_s - r.sessions.start_s, 0) / 60.0
        scores = {
            "viewers_now": viewers,
            "viewers_change_15m": viewers - earlier,
            "likes_per_viewer": recent / np.maximum(viewers, 1.0),
            "mastodon": self._mastodon(t_s, viewers, earlier),
            "hacker_news": np.maximum(likes - 1.0, 0.0) ** 0.8 / ((age_min + 120.0) / 60.0) ** 1.8,
            "reddit_hot": np.log10(np.maximum(likes, 1.0)) + r.sessions.start_s / REDDIT_SECONDS_PER_DECADE,
            "ewma_growth": smooth * (1.0 + (smooth - smooth_before) / np.maximum(smooth_before, MIN_VIEWERS)),
        }
        return {name: score for name, score in scores.items() if self._has_likes or name not in NEED_LIKES}

    def _mastodon(self, t_s: int, observed: NDArray[np.float64], before: NDArray[np.float64]) -> NDArray[np.float64]:
        expected = np.maximum(before, 1.0)
        surprise = (observed - expected) ** 2 / expected
        surprise[(observed < MASTODON_THRESHOLD) | (observed <= expected)] = 0.0
        higher = surprise > self._peak  # than the peak as it was, not as it decayed: so does Mastodon
        self._peak[higher] = surprise[higher]
        self._peak_s[higher] = t_s
        return self._peak * 0.5 ** ((t_s - self._peak_s) / MASTODON_HALF_LIFE_S)


def ewma(reports: Reports, half_life_s: float) -> NDArray[np.float64]:
    """float64[m]: decayed mean of the session's viewers as of each report; its weights halve every half-life."""
    smooth = np.empty(len(reports.t_s))
    session, total, weight, last_s = -1, 0.0, 0.0, 0
    columns = zip(reports.session.tolist(), reports.t_s.tolist(), reports.viewers.tolist())
    for i, (of, t_s, viewers) in enumerate(columns):
        if of != session:
            session, total, weight = of, 0.0, 0.0
        decay = 0.5 ** ((t_s - last_s) / half_life_s) if weight else 0.0
        total, weight, last_s = total * decay + viewers, weight * decay + 1.0, t_s
        smooth[i] = total / weight
    return smooth
