"""What the control plane needs to know of a model: the contract between it and each way of serving one."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:  # the process that tries a file wants the contract and none of this
    from server.rollout.guard import Trial, Viewers
    from server.scoring.versions import Versions

Rows = Mapping[str, NDArray[Any]]
"""Inputs by name, n rows each."""


@dataclass(frozen=True)
class Contract:
    """Tensors of a model, all float32 with the rows first. inputs, outputs: name → the dimensions after the rows.

    schema: of its features. lowest, highest: what an output may be.
    """

    schema: str
    inputs: Mapping[str, tuple[int, ...]]
    outputs: Mapping[str, tuple[int, ...]]
    lowest: float = 0.0
    highest: float = 1.0
    scored: str = field(default="")
    """The output that two versions are compared by; "": the only one."""

    @property
    def output(self) -> str:
        return self.scored or next(iter(self.outputs))


class ServingPath(Protocol):
    """One model in one server. Methods may be called from any thread, one at a time.

    model: its name. trial: what the candidate did so far.
    """

    model: str
    contract: Contract
    versions: Versions
    trial: Trial

    def answering(self) -> int:
        """The version whose scores are served now; 0: none."""
        ...

    def samples(self) -> Rows:
        """Rows that were really scored, at least one."""
        ...

    def pin(self, version: int) -> None:
        """The version that answers stays, whatever newer one appears."""
        ...

    def warm(self, version: int) -> NDArray[np.float32]:
        """Opens a version the way it will be served, and asks it about the samples until it is fast.

        Returns its last answer. Raises ScoringError.
        """
        ...

    def forget(self, version: int) -> None:
        """Closes a version that `warm` opened."""
        ...

    def begin(self, version: int, percent: float) -> None:
        """A trial, from scratch: from now on it scores ``percent`` of the traffic and serves nobody."""
        ...

    def share(self, scored_percent: float, served_percent: float) -> None:
        """How much of the traffic the candidate scores, and how many viewers are served by it."""
        ...

    def end(self) -> None:
        """No candidate from the next request on."""
        ...

    def promote(self, version: int) -> None:
        """Serves everybody by it, in one step between two batches.

        Raises Refused, ScoringError; nothing changed then.
        """
        ...

    def restore(self, version: int) -> None:
        """Like `promote`, but at any price and within a second: without its scores, by the formula."""
        ...

    def viewers(self) -> tuple[Viewers, Viewers, int, int]:
        """(of the serving version, of the candidate, its faults, viewers that it ranked)."""
        ...

    def is_troubled(self) -> bool:
        """Whether a version did not answer just now, so that it is worth looking what is loaded."""
        ...
