"""Strings as small numbers: creators, languages, categories, regions."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
from numpy.typing import NDArray


class Interner:
    """Gives every distinct string a number from 1 in order of arrival; 0 is the empty string."""

    def __init__(self) -> None:
        self._number: dict[str, int] = {"": 0}
        self.names: list[str] = [""]

    def __len__(self) -> int:
        return len(self.names)

    def intern(self, name: str) -> int:
        """The number of ``name``, new if need be."""
        number = self._number.get(name)
        if number is None:
            number = self._number[name] = len(self.names)
            self.names.append(name)
        return number

    def find(self, names: Iterable[str]) -> NDArray[np.int32]:
        """Numbers int32[n] of known names; unknown ones are left out (nothing can match them)."""
        found = (self._number.get(name) for name in names)
        return np.array(sorted({n for n in found if n is not None}), dtype=np.int32)
