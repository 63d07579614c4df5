"""Tensors through POSIX shared memory, with a Triton on the same machine.

The file in /dev/shm has a name only until Triton has mapped it, so a crash leaves nothing behind, but for one in
the moment between: the next start removes it.
"""

from __future__ import annotations

import contextlib
import logging
import mmap
import os
import secrets
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from tritonclient.grpc import InferenceServerClient

from server.errors import SharedMemoryRefused
from server.scoring.shared_memory import Region, SharedMemory

log = logging.getLogger(__name__)

SHM = Path("/dev/shm")
PREFIX = "liverank-scores"
SPARE_BYTES = 64 << 20
"""What `auto` leaves free: Triton's Python backend needs shared memory, too, and dies without."""


class SystemRegion(Region):
    """One file in shared memory, mapped; its input first, its output behind."""

    def __init__(self, name: str, capacity_rows: int, n_features: int, folder: Path) -> None:
        super().__init__(capacity_rows, n_features)
        self.input_name = self.output_name = name
        self.output_offset = self.input_bytes
        self._path = folder / name
        size = self.input_bytes + self.output_bytes
        file = os.open(self._path, os.O_CREAT | os.O_EXCL | os.O_RDWR | os.O_CLOEXEC, 0o600)
        try:
            # Taken now: a page that cannot be had later kills the process that touches it.
            os.posix_fallocate(file, 0, size)
            self._map = mmap.mmap(file, size)
        except OSError:
            self._path.unlink()
            raise
        finally:
            os.close(file)

    def register(self, client: InferenceServerClient, timeout_s: float) -> None:
        """See Region. The name goes away with it, whatever comes of it."""
        size = self.input_bytes + self.output_bytes
        try:
            client.register_system_shared_memory(self.input_name, f"/{self.input_name}", size, client_timeout=timeout_s)
        finally:
            self._path.unlink(missing_ok=True)

    def unregister(self, client: InferenceServerClient, timeout_s: float) -> None:
        """See Region."""
        client.unregister_system_shared_memory(self.input_name, client_timeout=timeout_s)

    def write(self, rows: NDArray[np.float32]) -> None:
        """See Region."""
        np.frombuffer(self._map, np.float32, rows.size)[:] = rows.ravel()

    def read(self, shape: tuple[int, ...]) -> NDArray[np.float32]:
        """See Region."""
        count = int(np.prod(shape))
        return np.frombuffer(self._map, np.float32, count, self.output_offset).reshape(shape).copy()

    def release(self) -> None:
        """See Region."""
        self._map.close()


class SystemSharedMemory(SharedMemory):
    """`Transport` over files in /dev/shm.

    Args:
        polite: refuses to take memory that Triton itself may need (`SPARE_BYTES`).
        folder: where shared memory is mounted; Triton must see the same.
    """

    name = "system_shm"

    def __init__(self, polite: bool = False, folder: Path = SHM) -> None:
        super().__init__()
        self._polite, self._folder = polite, folder
        sweep(folder)

    def region_name(self) -> str:
        """Named after this process in this process namespace, so that a later one can tell an orphan."""
        return f"{_family()}-{os.getpid()}-{secrets.token_hex(8)}"

    def make(self, name: str, capacity_rows: int, n_features: int) -> Region:
        """See SharedMemory."""
        size = 4 * capacity_rows * (n_features + 1)
        try:
            found = os.statvfs(self._folder)
            free = found.f_frsize * found.f_bavail
            if self._polite and free < size + SPARE_BYTES:
                raise SharedMemoryRefused(
                    f"{self._folder}: {free >> 20} MiB free, {size + SPARE_BYTES >> 20} MiB wanted"
                )
            return SystemRegion(name, capacity_rows, n_features, self._folder)
        except OSError as error:
            raise SharedMemoryRefused(f"{self._folder}: no region of {size >> 20} MiB: {error.strerror}") from error


def sweep(folder: Path = SHM) -> int:
    """Removes regions whose process is gone; returns how many."""
    removed = 0
    for path in folder.glob(f"{_family()}-*"):
        owner = path.name.removeprefix(f"{_family()}-").split("-")[0]
        if owner.isdigit() and not Path("/proc", owner).exists():
            with contextlib.suppress(OSError):  # another user's, or another start was faster
                path.unlink()
                removed += 1
                log.warning("removed shared memory of a server that is gone: %s", path)
    return removed


def _family() -> str:
    """Common to all servers whose process ids mean the same."""
    try:
        return f"{PREFIX}-{os.stat('/proc/self/ns/pid').st_ino}"
    except OSError:  # no /proc: no Linux, and nothing can be told about other processes
        return f"{PREFIX}-0"
