"""What a dataset job is: records go in, in the order of the log; rows come out once their labels are closed."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from kernels.idmap import hash_ids
from server.errors import LiverankError
from server.log.commit import Committed

Emit = Callable[[Any], None]
"""Takes an Arrow table of finished rows, in the order of the file."""


class LeakError(LiverankError):
    """A row's features were read from a state that already held what the row's labels tell, or its own event."""


@dataclass(frozen=True)
class Shard:
    """Which streams a job emits rows of: those whose id's hash is ``number`` modulo ``of``. All are applied."""

    number: int = 0
    of: int = 1

    def owns(self, keys: NDArray[np.uint64]) -> NDArray[np.bool_]:
        """bool[n] for stream keys uint64[n] of `stream_keys`."""
        return np.asarray(keys % np.uint64(self.of) == np.uint64(self.number))


class Job(Protocol):
    """One shard's work. told: what became of what was not emitted, name → count, for people."""

    told: Counter[str]

    def feed(self, committed: Committed) -> None:
        """Takes the next record of the log."""
        ...

    def finish(self) -> None:
        """The log has ended: emits what is closed, counts what is not."""
        ...


def stream_keys(ids: NDArray[np.uint8], lengths: NDArray[np.uint8]) -> NDArray[np.uint64]:
    """uint64[n]: what streams are told apart by here; uint8[n, 64], uint8[n]."""
    return hash_ids(ids, lengths)
