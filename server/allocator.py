"""Memory that a batch gives back is kept for the next one, instead of being returned to the kernel."""

from __future__ import annotations

import ctypes
import os

_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3  # numbers of mallopt(3)
KEPT_BYTES = 256 << 20
"""Free memory at the end of a heap up to which it stays."""
HEAP_BYTES = 32 << 20
"""Smaller blocks come from a heap. The most that glibc takes."""
_CHOSEN_BY = ("MALLOC_TRIM_THRESHOLD_", "MALLOC_MMAP_THRESHOLD_", "GLIBC_TUNABLES")


def keep_freed_memory() -> bool:
    """Tells glibc to keep what is freed; False when it was not told: another C library, or the environment decides.

    By default glibc returns the end of a heap as soon as 128 KiB of it are free, and takes larger blocks from the
    kernel each time. The columns of a batch of events are just that large: every batch would wait for the kernel to
    clear the same pages again.
    """
    if any(name in os.environ for name in _CHOSEN_BY):
        return False
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError):
        return False
    return bool(mallopt(_TRIM_THRESHOLD, KEPT_BYTES)) and bool(mallopt(_MMAP_THRESHOLD, HEAP_BYTES))
