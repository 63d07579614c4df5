"""Strings as small numbers: creators, languages, categories, regions."""

from __future__ import annotations

import heapq
from collections.abc import Iterable, Sequence

import numpy as np
from numpy.typing import NDArray


class Interner:
    """Gives every distinct string in use a number from 1; 0 is the empty string.

    A number that no row uses any more is given to the next new string, lowest first, so there are never more
    numbers than rows, and which one a string gets follows from the log alone (like the rows of the table).
    """

    def __init__(self) -> None:
        self._number: dict[str, int] = {"": 0}
        self.names: list[str] = [""]
        self._uses: list[int] = [0]
        self._free: list[int] = []
        self.changes = 0
        """How often a name got or lost a number: while it stays the same, so do all numbers."""

    def __len__(self) -> int:
        return len(self.names)

    def replace(self, old: int, name: str) -> int:
        """The number of ``name``, for a row that held ``old`` until now."""
        number = self._use(name)
        self.drop(old)
        return number

    def _use(self, name: str) -> int:
        if not name:
            return 0
        number = self._number.get(name)
        if number is None:
            if self._free:
                number = heapq.heappop(self._free)
                self.names[number] = name
            else:
                number = len(self.names)
                self.names.append(name)
                self._uses.append(0)
            self._number[name] = number
            self.changes += 1
        self._uses[number] += 1
        return number

    def drop(self, number: int) -> None:
        """A row holds ``number`` no longer."""
        if number == 0:
            return
        self._uses[number] -= 1
        if self._uses[number] == 0:
            del self._number[self.names[number]]
            self.names[number] = ""
            self.changes += 1
            heapq.heappush(self._free, number)

    def find(self, names: Iterable[str]) -> NDArray[np.int32]:
        """Numbers int32[n] of known names; unknown ones are left out (nothing can match them)."""
        return np.array(self.numbers(names), dtype=np.int32)

    def numbers(self, names: Iterable[str]) -> list[int]:
        """What `find` finds, as a list: an array for each of a batch costs more than the look-ups."""
        found = {self._number.get(name) for name in names}
        return sorted(number for number in found if number is not None)

    def restore(self, names: Sequence[str], used: NDArray[np.int32]) -> None:
        """Takes over ``names`` by number; ``used`` int32[rows] are the numbers that rows hold (0: none)."""
        self.changes += 1
        uses = np.bincount(used, minlength=len(names))
        uses[0] = 0
        self.names, self._uses = list(names), uses.tolist()
        self._number = {name: number for number, name in enumerate(names) if number == 0 or self._uses[number]}
        self._free = (np.flatnonzero(uses[1:] == 0) + 1).tolist()  # ascending, hence a heap
