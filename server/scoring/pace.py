"""How fast a model answers: what of it can be had within a time."""

from __future__ import annotations

_OF_A_CALL = 0.25
"""Weight of a call in the mean of seconds per row."""
_LONGER = 1.5
"""As which a call counts that was stopped, relative to when it was: longer, though nobody knows how much."""
_QUICKEST_ROW_S = 1e-12


class Pace:
    """Mean seconds per row of late calls, the later the heavier. One thread writes, any may read."""

    def __init__(self) -> None:
        self._row_s = 0.0  # 0: not known

    def took(self, rows: int, seconds: float) -> None:
        """A call of ``rows`` >= 1 was answered in ``seconds``."""
        per_row_s = seconds / rows
        self._row_s += (_OF_A_CALL if self._row_s else 1.0) * (per_row_s - self._row_s)

    def stopped(self, rows: int, seconds: float) -> None:
        """A call of ``rows`` >= 1 was given up after ``seconds``."""
        self.took(rows, _LONGER * seconds)

    def forget(self) -> None:
        """What was measured says nothing of what comes."""
        self._row_s = 0.0

    def rows_in(self, seconds: float) -> int:
        """Rows that a call is expected to have answered in ``seconds``; very many while nothing is known."""
        return int(seconds / max(self._row_s, _QUICKEST_ROW_S))
