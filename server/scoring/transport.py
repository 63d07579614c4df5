"""How tensors get to a Triton and back: the contract, the plain way, and the choice among the ways."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, Protocol

import numpy as np
from numpy.typing import NDArray
from tritonclient.grpc import InferenceServerClient, InferInput, InferRequestedOutput, InferResult
from tritonclient.utils import InferenceServerException

from server.errors import BadScores, ConfigError, SharedMemoryRefused
from server.scoring.address import is_this_machine
from server.scoring.model_config import INPUT, OUTPUT

log = logging.getLogger(__name__)

TransportName = Literal["auto", "cuda_shm", "system_shm", "plain"]
RETRY_S = 60.0
"""How long `auto` stays with plain tensors after shared memory was refused."""


@dataclass(frozen=True)
class Call:
    """What `InferenceServerClient.infer` is given."""

    inputs: list[InferInput]
    outputs: list[InferRequestedOutput]


class Transport(Protocol):
    """One way of tensors. Used by one thread, one call at a time."""

    @property
    def name(self) -> str:
        """ "plain", "system_shm" or "cuda_shm"."""
        ...

    def prepare(self, client: InferenceServerClient, rows: NDArray[np.float32], timeout_s: float) -> Call:
        """Puts float32[n, F] where Triton finds them.

        Raises:
            SharedMemoryRefused: this way cannot be used now. InferenceServerException: Triton is not there.
        """
        ...

    def read(self, result: InferResult, n_rows: int, label: str) -> NDArray[Any]:
        """The scores of the call just answered, shape as the model declared it. Raises BadScores."""
        ...

    def is_lost(self, error: InferenceServerException) -> bool:
        """Whether Triton says that it does not know what `prepare` told it: it was restarted in between."""
        ...

    def failed(self) -> None:
        """The call failed, or may still be running: nothing it can touch is used for another one."""
        ...

    def close(self, client: InferenceServerClient | None) -> None:
        """Releases everything; tells Triton if there is a client."""
        ...


class PlainTensors:
    """Tensors inside the messages."""

    name = "plain"

    def prepare(self, client: InferenceServerClient, rows: NDArray[np.float32], timeout_s: float) -> Call:
        """See Transport."""
        return Call([InferInput(INPUT, rows.shape, "FP32").set_data_from_numpy(rows)], [InferRequestedOutput(OUTPUT)])

    def read(self, result: InferResult, n_rows: int, label: str) -> NDArray[Any]:
        """See Transport. A read-only view of the reply."""
        try:
            return np.asarray(result.as_numpy(OUTPUT))
        except ValueError as error:  # as many bytes as the shape says were not there
            raise BadScores(f"{label} answered a broken tensor: {error}") from error

    def is_lost(self, error: InferenceServerException) -> bool:
        """See Transport. There is nothing that Triton could have forgotten."""
        return False

    def failed(self) -> None:
        """See Transport. A message belongs to its call alone."""

    def close(self, client: InferenceServerClient | None) -> None:
        """See Transport."""


class Auto:
    """Shared memory while it works, plain tensors when it is refused; tried again later and after a failure.

    Args:
        on_fallback: told once per refusal.
    """

    def __init__(self, preferred: Transport, on_fallback: Callable[[], None]) -> None:
        self._preferred, self._plain = preferred, PlainTensors()
        self._on_fallback = on_fallback
        self._current: Transport = preferred
        self._again_s = 0.0

    @property
    def name(self) -> str:
        """The way that is in use."""
        return self._current.name

    def prepare(self, client: InferenceServerClient, rows: NDArray[np.float32], timeout_s: float) -> Call:
        """See Transport; never refuses."""
        if time.monotonic() >= self._again_s:
            try:
                call = self._preferred.prepare(client, rows, timeout_s)
            except SharedMemoryRefused as refusal:
                self._again_s = time.monotonic() + RETRY_S
                self._on_fallback()
                log.warning("%s is refused, tensors go inside the messages: %s", self._preferred.name, refusal)
            else:
                self._current = self._preferred
                return call
        self._current = self._plain
        return self._plain.prepare(client, rows, timeout_s)

    def read(self, result: InferResult, n_rows: int, label: str) -> NDArray[Any]:
        """See Transport."""
        return self._current.read(result, n_rows, label)

    def is_lost(self, error: InferenceServerException) -> bool:
        """See Transport."""
        return self._current.is_lost(error)

    def failed(self) -> None:
        """See Transport."""
        self._preferred.failed()
        self._again_s = 0.0  # it may be another Triton by now

    def close(self, client: InferenceServerClient | None) -> None:
        """See Transport."""
        self._preferred.close(client)


def open_transport(
    setting: TransportName, address: str, on_gpu: bool = False, on_fallback: Callable[[], None] = lambda: None
) -> Transport:
    """The transport that ``setting`` means for a Triton at ``address``; logs which.

    "auto" takes shared memory only with a Triton on this machine: CUDA shared memory if this process computes on a
    GPU, else system shared memory.

    Raises:
        ConfigError: "cuda_shm", and its libraries cannot be loaded.
    """
    transport: Transport = PlainTensors()
    if setting == "cuda_shm" or (setting == "auto" and on_gpu and is_this_machine(address)):
        transport = _cuda_or_system(setting, on_fallback)
    elif setting == "system_shm" or (setting == "auto" and is_this_machine(address)):
        transport = _system(setting)
    log.info("scoring.transport = %s: %s to %s", setting, transport.name, address)
    return Auto(transport, on_fallback) if setting == "auto" and transport.name != "plain" else transport


def _cuda_or_system(setting: TransportName, on_fallback: Callable[[], None]) -> Transport:
    from server.scoring.cuda_shm import CudaSharedMemory

    try:
        return CudaSharedMemory()
    except ConfigError as error:
        if setting != "auto":
            raise
        on_fallback()
        log.warning("%s; tensors go through system shared memory", error)
        return _system(setting)


def _system(setting: TransportName) -> Transport:
    from server.scoring.system_shm import SystemSharedMemory

    return SystemSharedMemory(polite=setting == "auto")
