"""Memory that is freed is kept, unless the environment says otherwise. In processes of their own: it is for good."""

from __future__ import annotations

import os
import platform
import subprocess
import sys

import pytest

PROGRAM = """
import resource, sys
from server.allocator import keep_freed_memory

def faults():
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt

told = keep_freed_memory()
before = 0
for turn in range(41):
    before = faults() if turn == 1 else before
    batch = [bytearray(100_000) for _ in range(20)]
    del batch
print(told, faults() - before)
"""


def run(**environment: str) -> tuple[str, int]:
    """(whether it was told, pages that the kernel had to clear for 40 batches of 2 MB each)."""
    clean = {name: value for name, value in os.environ.items() if not name.startswith(("MALLOC_", "GLIBC_"))}
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM], env={**clean, **environment}, check=True, capture_output=True, timeout=60
    )
    told, faults = done.stdout.decode().split()
    return told, int(faults)


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="another C library decides by itself")
def test_the_memory_of_a_batch_serves_the_next_unless_the_environment_decides() -> None:
    told, faults = run()
    assert told == "True" and faults < 200
    assert run(MALLOC_TRIM_THRESHOLD_="131072")[0] == "False"
    assert run(MALLOC_TRIM_THRESHOLD_="131072")[1] > 5_000, "what it is for: without, the kernel clears them each time"
