"""Tries an ONNX file in a process of its own: one that crashes, hangs or eats memory takes nothing with it.

Its arguments are MODEL.onnx ROWS.npz CONTRACT.json SCORES.npy. It prints one line of JSON: {"refused": "why"} or
{"schema": …, "metrics": {…}, "commit": …}.
"""

from __future__ import annotations

import contextlib
import json
import resource
import subprocess
import sys
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from server.errors import ModelRefused
from server.rollout.base import Contract, Rows
from server.rollout.repository import Facts

WITHIN_S = 60.0
MEMORY_BYTES = 8 << 30
TOLERANCE = 1e-3
ROOT = Path(__file__).resolve().parents[2]
# Whoever is being served comes first, from the very begin: reading the libraries takes longer than trying the model.
_BEGIN = "import os; os.nice(10); import sys; from server.rollout import probe; sys.exit(probe.main(sys.argv[1:]))"


@dataclass(frozen=True)
class Tried:
    """What the file says about itself, and its answer float32[n] about the sampled rows."""

    facts: Facts
    scores: NDArray[np.float32]


def try_model(model: Path, contract: Contract, rows: Rows) -> Tried:
    """Reads the file, compares its tensors with the contract, runs it on one row and on all rows.

    Raises:
        ModelRefused: unreadable, other tensors, wrong shape, not finite or out of range, too slow, or it crashed.
    """
    with tempfile.TemporaryDirectory(prefix="liverank-probe-") as name:
        folder = Path(name)
        np.savez(folder / "rows.npz", **{name: np.asarray(column) for name, column in rows.items()})  # type: ignore[arg-type]
        (folder / "contract.json").write_text(json.dumps(asdict(contract)))
        command = [sys.executable, "-c", _BEGIN, str(model)]
        command += [str(folder / file) for file in ("rows.npz", "contract.json", "scores.npy")]
        try:
            done = subprocess.run(
                command, capture_output=True, text=True, timeout=WITHIN_S, check=False, cwd=ROOT,
                stdin=subprocess.DEVNULL,
            )  # fmt: skip
        except subprocess.TimeoutExpired:
            raise ModelRefused(f"it did not answer {len(next(iter(rows.values())))} rows in {WITHIN_S:g} s") from None
        line = done.stdout.strip().splitlines()[-1:] or [""]
        with contextlib.suppress(ValueError):
            told = json.loads(line[0])
            if "refused" in told:
                raise ModelRefused(told["refused"])
            scores = np.load(folder / "scores.npy", allow_pickle=False)
            return Tried(Facts(told["schema"], told["commit"], told["metrics"]), scores)
        tail = " ".join(done.stderr.split())[-200:]
        raise ModelRefused(f"the process that tried it ended with status {done.returncode}: {tail or 'no message'}")


def main(arguments: list[str]) -> int:
    """See the module."""
    model, rows, contract, out = map(Path, arguments)
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY_BYTES, MEMORY_BYTES))
    values = json.loads(contract.read_text())
    shapes = {side: {name: tuple(dims) for name, dims in values[side].items()} for side in ("inputs", "outputs")}
    wanted = Contract(**{**values, **shapes})
    try:
        facts, scores = _tried(model, wanted, dict(np.load(rows, allow_pickle=False)))
    except ModelRefused as refusal:
        print(json.dumps({"refused": str(refusal)}))
        return 1
    np.save(out, scores)
    print(json.dumps(facts))
    return 0


def _tried(model: Path, wanted: Contract, rows: dict[str, NDArray[Any]]) -> tuple[dict[str, Any], NDArray[np.float32]]:
    import onnxruntime

    from server.scoring.ort_errors import ORT_ERRORS

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    options.log_severity_level = 4
    try:
        session = onnxruntime.InferenceSession(str(model), options, providers=["CPUExecutionProvider"])
    except ORT_ERRORS as error:
        raise ModelRefused(f"{model.name} cannot be read: {' '.join(str(error).split())[:300]}") from error
    _check_tensors("input", {t.name: t for t in session.get_inputs()}, wanted.inputs)
    outputs = {t.name: t for t in session.get_outputs()}
    _check_tensors("output", {n: t for n, t in outputs.items() if n in wanted.outputs}, wanted.outputs)
    n_rows = len(next(iter(rows.values())))
    for n in (1, n_rows):
        try:
            answers = session.run(list(wanted.outputs), {name: column[:n] for name, column in rows.items()})
        except ORT_ERRORS as error:
            raise ModelRefused(f"it does not run on {n} rows: {' '.join(str(error).split())[:300]}") from error
        for (name, dims), answer in zip(wanted.outputs.items(), answers, strict=True):
            _check_answer(name, np.asarray(answer), (n, *dims), wanted)
    known = dict(session.get_modelmeta().custom_metadata_map)
    metrics = {k.removeprefix("metric."): _number(k, v) for k, v in known.items() if k.startswith("metric.")}
    facts = {"schema": known.get("feature_schema", ""), "commit": known.get("commit", ""), "metrics": metrics}
    return facts, np.asarray(answers[list(wanted.outputs).index(wanted.output)], np.float32)


def _check_tensors(kind: str, found: dict[str, Any], wanted: Any) -> None:
    if set(found) != set(wanted):
        raise ModelRefused(f"{kind}s {sorted(wanted)} wanted, it has {sorted(found)}")
    for name, dims in wanted.items():
        tensor = found[name]
        if tensor.type != "tensor(float)":
            raise ModelRefused(f"{kind} {name}: float32 wanted, it has {tensor.type}")
        fixed = tensor.shape[1:]
        free = isinstance(tensor.shape[0], str | None) if tensor.shape else False
        fits = len(fixed) == len(dims) and all(d == w for d, w in zip(fixed, dims) if isinstance(d, int))
        if not (free and fits):
            raise ModelRefused(f"{kind} {name}: shape {['n', *dims]} wanted, it has {tensor.shape}")


def _check_answer(name: str, answer: NDArray[Any], shape: tuple[int, ...], wanted: Contract) -> None:
    if answer.shape != shape:
        raise ModelRefused(f"output {name}: {list(shape)} wanted for {shape[0]} rows, it answered {list(answer.shape)}")
    if bad := int(np.count_nonzero(~np.isfinite(answer))):
        raise ModelRefused(f"output {name}: {bad} of {answer.size} values are not finite on the warm-up sample")
    low, high = float(answer.min()), float(answer.max())
    if low < wanted.lowest - TOLERANCE or high > wanted.highest + TOLERANCE:
        raise ModelRefused(
            f"output {name}: {wanted.lowest:g} to {wanted.highest:g} wanted, it answered {low:.4g} to {high:.4g}"
        )


def _number(name: str, text: str) -> float:
    try:
        return float(text)
    except ValueError:
        raise ModelRefused(f"its metadata {name!r} is {text[:40]!r}, a number wanted") from None
