"""Numba's cache keeps what was compiled from a file until that file changes, whatever it calls in others."""

from __future__ import annotations

import hashlib
from pathlib import Path
from types import ModuleType

import pytest

from kernels import blend, candidate_order, cosines, eligibility, greedy, ranker_rows, topk, topk_int8, vectors, verify


def digest(*modules: ModuleType) -> str:
    text = b"".join(Path(str(module.__file__)).read_bytes() for module in modules)
    return hashlib.sha256(text).hexdigest()[:16]


@pytest.mark.parametrize(
    ("module", "calls"),
    [
        (topk, (vectors,)),
        (topk_int8, (vectors, topk)),
        (greedy, (candidate_order, cosines, vectors)),
        (blend, (cosines, vectors)),
        (verify, (eligibility,)),
        (ranker_rows, (vectors,)),
    ],
)
def test_a_file_changes_when_what_it_compiles_in_changes(module: ModuleType, calls: tuple[ModuleType, ...]) -> None:
    assert digest(*calls) == module.COMPILED_WITH, f"set COMPILED_WITH of {module.__name__} to {digest(*calls)}"
