"""What both kinds of shared memory share: when a region is made, registered, given up and released.

A call that timed out may still be running: Triton will read the region's input and write its output whenever it
gets there. So a region is never used again after a failure. It is given up, the next call gets a new one, and the
old one is released as soon as Triton agrees to forget it (it refuses while a call uses it).
"""

from __future__ import annotations

import abc
import secrets
import time
from typing import Any

import numpy as np
from numpy.typing import NDArray
from tritonclient.grpc import InferenceServerClient, InferInput, InferRequestedOutput, InferResult
from tritonclient.utils import InferenceServerException

from server.errors import BadScores, SharedMemoryRefused
from server.scoring.model_config import INPUT, OUTPUT
from server.scoring.transport import Call

LEAST_ROWS = 1024
MAX_GIVEN_UP = 4
"""Regions that calls may still be using; beyond that shared memory is refused until Triton lets go."""
CLOSE_S = 2.0
"""For Triton to forget a region when its owner goes; what it does not, it keeps mapped until it ends."""
_AGAIN_S = 0.005
_NOT_THERE = ("StatusCode.UNAVAILABLE", "StatusCode.DEADLINE_EXCEEDED", "StatusCode.CANCELLED")


class Region(abc.ABC):
    """Memory for one call: input float32[capacity_rows, F], output float32[capacity_rows].

    input_name, output_name: as registered with Triton, may be equal; output_offset: of the output in its region.
    """

    input_name: str
    output_name: str
    output_offset: int

    def __init__(self, capacity_rows: int, n_features: int) -> None:
        self.capacity_rows = capacity_rows
        self.input_bytes = 4 * capacity_rows * n_features
        self.output_bytes = 4 * capacity_rows

    @abc.abstractmethod
    def register(self, client: InferenceServerClient, timeout_s: float) -> None:
        """Makes Triton map it. Raises InferenceServerException."""

    @abc.abstractmethod
    def unregister(self, client: InferenceServerClient, timeout_s: float) -> None:
        """Makes Triton forget it; no error if it does not know it. Raises InferenceServerException while in use."""

    @abc.abstractmethod
    def write(self, rows: NDArray[np.float32]) -> None:
        """Copies float32[n, F] into the input."""

    @abc.abstractmethod
    def read(self, shape: tuple[int, ...]) -> NDArray[np.float32]:
        """A copy of the output."""

    @abc.abstractmethod
    def release(self) -> None:
        """Gives the memory back; Triton does not use it any more."""


class SharedMemory(abc.ABC):
    """`Transport` over regions of one kind."""

    name: str

    def __init__(self) -> None:
        self._region: Region | None = None
        self._given_up: list[Region] = []

    @abc.abstractmethod
    def make(self, name: str, capacity_rows: int, n_features: int) -> Region:
        """A new region. Raises SharedMemoryRefused when there is no room, or no such memory."""

    def region_name(self) -> str:
        """Unique among all regions that any process registers."""
        return f"liverank-scores-{secrets.token_hex(8)}"

    def prepare(self, client: InferenceServerClient, rows: NDArray[np.float32], timeout_s: float) -> Call:
        """See Transport. A region is made on the first call, and when a call has more rows than any before."""
        n, n_features = rows.shape
        if self._region is not None and self._region.capacity_rows < n:
            self.failed()
        if self._region is None:
            self._tidy(client, timeout_s)
            self._region = self._registered(client, n, n_features, timeout_s)
        region = self._region
        region.write(rows)
        tensor = InferInput(INPUT, [n, n_features], "FP32")
        tensor.set_shared_memory(region.input_name, rows.nbytes)
        wanted = InferRequestedOutput(OUTPUT)
        wanted.set_shared_memory(region.output_name, region.output_bytes, region.output_offset)
        return Call([tensor], [wanted])

    def _registered(self, client: InferenceServerClient, n: int, n_features: int, timeout_s: float) -> Region:
        capacity_rows = max(LEAST_ROWS, 1 << (n - 1).bit_length())
        region = self.make(self.region_name(), capacity_rows, n_features)
        try:
            region.register(client, timeout_s)
        except InferenceServerException as error:
            self._given_up.append(region)  # a registration that timed out may still happen
            if error.status() in _NOT_THERE:
                raise
            raise SharedMemoryRefused(f"Triton cannot map our {self.name} region: {error.message()}") from error
        return region

    def _tidy(self, client: InferenceServerClient, timeout_s: float) -> None:
        """Releases what was given up and is not in use any more."""
        still_used = []
        for region in self._given_up:
            try:
                region.unregister(client, timeout_s)
            except InferenceServerException as error:
                if error.status() in _NOT_THERE:
                    raise
                still_used.append(region)
            else:
                region.release()
        self._given_up = still_used
        if len(still_used) >= MAX_GIVEN_UP:
            raise SharedMemoryRefused(f"{len(still_used)} regions are still used by calls that timed out")

    def read(self, result: InferResult, n_rows: int, label: str) -> NDArray[Any]:
        """See Transport."""
        declared = result.get_output(OUTPUT)
        shape = tuple(int(length) for length in declared.shape)
        if self._region is None or 4 * int(np.prod(shape)) > self._region.output_bytes:
            raise BadScores(f"{label} answered {list(shape)}, wanted is [{n_rows}]")
        return self._region.read(shape)

    def is_lost(self, error: InferenceServerException) -> bool:
        """See Transport."""
        return error.status() == "StatusCode.NOT_FOUND" and "shared memory region" in error.message()

    def failed(self) -> None:
        """See Transport."""
        region, self._region = self._region, None
        if region is not None:
            self._given_up.append(region)

    def close(self, client: InferenceServerClient | None) -> None:
        """See Transport. Waits `CLOSE_S` at most; what Triton still uses then, it keeps mapped."""
        self.failed()
        ends_s, there = time.monotonic() + CLOSE_S, client is not None
        for region in self._given_up:
            if client is not None and there:
                there = _forgotten(region, client, ends_s)
            region.release()
        self._given_up = []


def _forgotten(region: Region, client: InferenceServerClient, ends_s: float) -> bool:
    """Asks Triton to forget a region, again while a call uses it: one is in use for a moment after its answer came.
    False when there is no Triton, or no time left."""
    while (left_s := ends_s - time.monotonic()) > 0:
        try:
            region.unregister(client, left_s)
            return True
        except InferenceServerException as error:
            if error.status() in _NOT_THERE:
                return False
        time.sleep(min(_AGAIN_S, left_s))
    return False
