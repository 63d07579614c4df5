"""For all tests: settings come from the test alone."""

from __future__ import annotations

import os

import pytest
from hypothesis import HealthCheck, settings

from kernels.backend import visible_gpu

if visible_gpu() is None:
    # Before any module with a Triton kernel is imported: it decides at definition who runs the kernel.
    os.environ.setdefault("TRITON_INTERPRET", "1")

# A busy machine is no fault of what is tested: no time limit on an example, nor on making one.
settings.register_profile("liverank", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("liverank")


@pytest.fixture(autouse=True, scope="session")
def _no_settings_from_the_environment() -> None:
    for name in [name for name in os.environ if name.startswith("LIVERANK_")]:
        del os.environ[name]
