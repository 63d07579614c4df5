"""After SERVING nothing is compiled any more: a first call must not stall for seconds."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]

PROGRAM = """
import importlib, pkgutil, sys
from pathlib import Path

import numpy as np
from numba.core.dispatcher import Dispatcher

import kernels
from tests.app import running_app
from tests.events import event, started

def specialisations():
    modules = [importlib.import_module(f"kernels.{m.name}") for m in pkgutil.iter_modules(kernels.__path__)]
    found = {(d.__module__, d.__name__): d for m in modules for d in vars(m).values() if isinstance(d, Dispatcher)}
    return {name: len(d.signatures) for name, d in found.items()}

Path(sys.argv[1]).mkdir()
with running_app(Path(sys.argv[1]), retrieval={"engine": sys.argv[2]}) as client:
    before = specialisations()
    client.publish(*(started(f"s{i}", 0, embedding=[1.0, float(i), 0.5, 0.25], language="en") for i in range(30)))
    client.publish(
        event("s1", 0, viewer="v", chatted={}), event("s2", 0, viewer_count={"count": 5}),
        event("s3", 0, epoch=1, ended={}),
        event("s4", 0, epoch=1, heartbeat={"media_sequence": 3}), event("s5", 0, moderated={"action": 1}),
        event("s6", 0, bid={"amount_minor": 5, "currency": "USD"}), event("ghost", 0, liked={}),
    )
    client.tick()
    for fields in ({}, {"viewer_embedding": [1.0, 2.0, 3.0, 4.0]}, {"languages": ["en"]}, {"categories": ["x"]},
                   {"exclude_stream_ids": ["s7"], "followed_creator_ids": ["creator-s8"], "limit": 3}):
        client.rank(**fields)
    client.clock.advance(60_000)
    client.tick()
    client.rank()
    after = specialisations()
assert sum(before.values()) > 10, before
late = {name: (before[name], n) for name, n in after.items() if n != before[name]}
assert not late, f"compiled or loaded while serving: {late}"
"""


def test_no_kernel_is_compiled_after_the_server_says_serving(tmp_path: Path) -> None:
    for engine in ("exact", "faiss_cpu"):
        done = subprocess.run(
            [sys.executable, "-c", PROGRAM, str(tmp_path / engine), engine],
            cwd=ROOT, capture_output=True, text=True, timeout=240, check=False,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr[-3000:]
