"""Fuzzes the decoders: ``python tests/fuzz/run.py --seconds 60 [--target NAME …] [--plain]``.

With atheris (coverage-guided; ``pip install atheris``) where it is installed, else with plain mutations of the seeds.
Each target has a process of its own, so that one which crashes natively is told apart. What breaks a decoder is
written to ``tests/fuzz/corpus/TARGET/``, where the tests replay it from then on. The last line is JSON.
"""

from __future__ import annotations

import argparse
import hashlib
import importlib.util
import json
import re
import subprocess
import sys
import tempfile
import time
import traceback
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=60.0, help="in all, shared evenly among the targets")
    parser.add_argument("--target", nargs="*", default=[], help="default: all")
    parser.add_argument("--plain", action="store_true", help="mutations only, even where atheris is installed")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--child", help=argparse.SUPPRESS)
    options = parser.parse_args()
    guided = not options.plain and importlib.util.find_spec("atheris") is not None
    if options.child:
        return (_guided if guided else _plain)(options.child, options.seconds, options.seed)
    from tests.fuzz.targets import TARGETS

    names = options.target or list(TARGETS)
    if unknown := set(names) - set(TARGETS):
        parser.error(f"unknown target {', '.join(sorted(unknown))}; there are {', '.join(TARGETS)}")
    results = {name: _in_child(name, options.seconds / len(names), options.seed, options.plain) for name in names}
    inputs, broken = sum(r["inputs"] for r in results.values()), [n for n, r in results.items() if not r["sound"]]
    print(
        json.dumps({"fuzz": "atheris" if guided else "plain", "inputs": inputs, "broken": broken, "targets": results})
    )
    return 1 if broken else 0


def _in_child(name: str, seconds: float, seed: int, plain: bool) -> dict[str, int | bool]:
    command = [sys.executable, __file__, "--child", name, "--seconds", str(seconds), "--seed", str(seed)]
    done = subprocess.run(
        command + ["--plain"] * plain, cwd=ROOT, capture_output=True, text=True, errors="replace",
        timeout=seconds + 300, check=False,
    )  # fmt: skip
    told = done.stdout + done.stderr
    counts = re.findall(r"(?:stat::number_of_executed_units|inputs):\s*(\d+)", told)
    sound = done.returncode == 0 and bool(counts)
    print(f"{name:24} {counts[-1] if counts else '?':>9} inputs  {'ok' if sound else 'BROKEN'}", flush=True)
    if not sound:
        print(told[-6000:])
    return {"inputs": int(counts[-1]) if counts else 0, "sound": sound}


def _guided(name: str, seconds: float, seed: int) -> int:
    import atheris

    with atheris.instrument_imports(include=["server", "loadtest.replay", "tests.fuzz.targets", "tomllib"]):
        from tests.fuzz.targets import CORPUS, TARGETS
    target = TARGETS[name]
    (CORPUS / name).mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="liverank-fuzz-") as folder:
        for i, data in enumerate(target.seeds()):
            (Path(folder) / str(i)).write_bytes(data)
        arguments = [f"-max_total_time={max(1, int(seconds))}", f"-seed={seed}", f"-max_len={target.max_bytes}"]
        arguments += ["-print_final_stats=1", f"-artifact_prefix={CORPUS / name}/", "-timeout=20", folder]
        atheris.Setup([sys.argv[0], *arguments], lambda data: target.run(data) and None)
        atheris.Fuzz()  # ends the process
    return 0


def _plain(name: str, seconds: float, seed: int) -> int:
    from tests.fuzz.targets import CORPUS, TARGETS

    target, rng = TARGETS[name], np.random.default_rng(seed)
    seeds = target.seeds()
    inputs, ends_s = 0, time.monotonic() + seconds
    while time.monotonic() < ends_s:
        data = mutate(seeds[int(rng.integers(len(seeds)))], rng, target.max_bytes)
        inputs += 1
        try:
            target.run(data)
        except Exception:  # noqa: BLE001 - this is what is looked for
            traceback.print_exc()
            kept = CORPUS / name / hashlib.sha256(data).hexdigest()[:16]
            kept.parent.mkdir(parents=True, exist_ok=True)
            kept.write_bytes(data)
            print(f"inputs: {inputs}; broken by {kept}")
            return 1
    print(f"inputs: {inputs}")
    return 0


def mutate(data: bytes, rng: np.random.Generator, max_bytes: int) -> bytes:
    """A few random changes: bytes flipped, set to extremes, cut out, repeated or put in."""
    out = bytearray(data)
    for _ in range(int(rng.integers(1, 5))):
        at, length = int(rng.integers(len(out) + 1)), int(rng.integers(1, 9))
        match int(rng.integers(5)):
            case 0 if at < len(out):
                out[at] ^= 1 << int(rng.integers(8))
            case 1 if at < len(out):
                out[at] = int(rng.choice([0, 1, 0x7F, 0x80, 0xFF, 0x22, 0x0A]))
            case 2:
                del out[at : at + length]
            case 3:
                out[at:at] = out[at : at + 4 * length]
            case _:
                out[at:at] = rng.integers(0, 256, length).astype(np.uint8).tobytes()
    return bytes(out[:max_bytes])


if __name__ == "__main__":
    sys.exit(main())
