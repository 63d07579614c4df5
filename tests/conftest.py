"""For all tests: settings come from the test alone."""

from __future__ import annotations

import os

import pytest


@pytest.fixture(autouse=True, scope="session")
def _no_settings_from_the_environment() -> None:
    for name in [name for name in os.environ if name.startswith("LIVERANK_")]:
        del os.environ[name]
