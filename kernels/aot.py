"""Compiles every GPU kernel ahead of time, without a GPU: `python -m kernels.aot`.

Each ``*_gpu.py`` module lists its kernels in ``AOT``. Every one is compiled for sm_80 and sm_90; registers, spills
and shared memory are printed, and a spill is an error: it means memory traffic that nobody asked for.
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from importlib import import_module
from pathlib import Path
from typing import Any

ARCHITECTURES = (80, 90)
SHARED_LIMIT_BYTES = {80: 163 << 10, 90: 227 << 10}
"""Shared memory that one program may take (CUDA programming guide, compute capabilities)."""


@dataclass(frozen=True)
class Compiled:
    """A kernel as it is launched: its Triton function, the types of its arguments, its constants.

    types: one per argument that is no constant, in order, as Triton names them ("*fp32 i32 …").
    """

    kernel: Any
    types: str
    constants: dict[str, Any] = field(default_factory=dict)
    num_warps: int = 4
    num_stages: int = 3
    fp_fusion: bool = True
    """Whether a product and a sum may become one instruction, rounded once."""
    label: str = ""
    """Tells apart two compilations of one kernel."""


@dataclass(frozen=True)
class Usage:
    """What one kernel takes on one architecture. stack_bytes: spills and local arrays, per thread."""

    kernel: str
    sm: int
    registers: int
    stack_bytes: int
    shared_bytes: int
    threads: int


def listed() -> Iterator[tuple[str, Compiled]]:
    """(module, compilation) of every kernel in kernels/*_gpu.py."""
    for path in sorted(Path(__file__).parent.glob("*_gpu.py")):
        module = import_module(f"kernels.{path.stem}")
        for compiled in getattr(module, "AOT", ()):
            yield path.stem, compiled


def compile_ahead(compiled: Compiled, sm: int) -> Usage:
    """Compiles for one architecture; works without a driver, not under TRITON_INTERPRET.

    Raises:
        Whatever the Triton compiler or ptxas says of a kernel that does not compile.
    """
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    kernel = compiled.kernel
    free = [name for name in kernel.arg_names if name not in compiled.constants]
    types = compiled.types.split()
    if len(free) != len(types):
        raise ValueError(f"{kernel.__name__}: {len(free)} arguments {free}, but {len(types)} types")
    signature = {name: "constexpr" for name in compiled.constants} | dict(zip(free, types, strict=True))
    # Columns start at multiples of 256 bytes; a launch sees that and loads in vectors, so must this.
    aligned = {
        (place,): [["tt.divisibility", 16]]
        for place, name in enumerate(kernel.arg_names)
        if signature[name].startswith("*")
    }
    source = ASTSource(kernel, {name: signature[name] for name in kernel.arg_names}, compiled.constants, aligned)
    options = {
        "num_warps": compiled.num_warps,
        "num_stages": compiled.num_stages,
        "enable_fp_fusion": compiled.fp_fusion,
    }
    built = triton.compile(source, target=GPUTarget("cuda", sm, 32), options=options)
    registers, stack_bytes = _resources(built.asm["cubin"])
    name = kernel.__name__.strip("_") + (f"[{compiled.label}]" if compiled.label else "")
    return Usage(name, sm, registers, stack_bytes, built.metadata.shared, 32 * compiled.num_warps)


def _resources(cubin: bytes) -> tuple[int, int]:
    """(registers, stack bytes) of the one function in a cubin."""
    import triton

    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [str(tool), "-res-usage", file.name]
        text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    found = re.search(r"REG:(\d+) STACK:(\d+)", text)
    if found is None:
        raise RuntimeError(f"cuobjdump said nothing of registers: {text!r}")
    return int(found[1]), int(found[2])


def faults(usage: Usage) -> list[str]:
    """Why this usage is refused; empty when it is fine."""
    found = []
    if usage.stack_bytes:
        found.append(f"{usage.kernel} sm_{usage.sm}: {usage.stack_bytes} bytes per thread spilled to the stack")
    if usage.shared_bytes > SHARED_LIMIT_BYTES[usage.sm]:
        found.append(f"{usage.kernel} sm_{usage.sm}: {usage.shared_bytes} bytes of shared memory do not fit")
    return found


def main() -> int:
    """Prints a table and, last, JSON; exit status 1 when a kernel spills or does not fit."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--only", default="", help="modules whose name contains this")
    only = parser.parse_args().only
    usages: list[Usage] = []
    print(f"{'module':<16}{'kernel':<34}{'sm':>4}{'registers':>11}{'stack B':>9}{'shared B':>10}{'threads':>9}")
    for module, compiled in listed():
        if only not in module:
            continue
        for sm in ARCHITECTURES:
            usage = compile_ahead(compiled, sm)
            usages.append(usage)
            print(
                f"{module:<16}{usage.kernel:<34}{sm:>4}{usage.registers:>11}{usage.stack_bytes:>9}"
                f"{usage.shared_bytes:>10}{usage.threads:>9}"
            )
    refused = [fault for usage in usages for fault in faults(usage)]
    for fault in refused:
        print(fault, file=sys.stderr)
    print(json.dumps({"kernels": [asdict(usage) for usage in usages], "refused": refused}))
    return 1 if refused or not usages else 0


if __name__ == "__main__":
    sys.exit(main())
