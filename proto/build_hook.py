"""Build hook: turns proto/liverank/v1/*.proto into the importable package `liverank.v1`.

One mechanism for everyone: `pip install .`, `pip install -e .` and `make setup` all run it.
The generated files are not committed.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from hatchling.builders.hooks.plugin.interface import BuildHookInterface


class ProtoBuildHook(BuildHookInterface):  # type: ignore[type-arg]
    def initialize(self, version: str, build_data: dict[str, Any]) -> None:
        import grpc_tools
        from grpc_tools import protoc

        root = Path(self.root)
        out = root / "liverank" / "v1"
        out.mkdir(parents=True, exist_ok=True)
        for package in (out.parent, out):
            (package / "__init__.py").write_text('"""Generated from proto/; do not edit."""\n')
        sources = sorted(str(p) for p in (root / "proto" / "liverank" / "v1").glob("*.proto"))
        well_known = Path(grpc_tools.__file__).parent / "_proto"
        status = protoc.main(
            [
                "protoc",
                f"-I{root / 'proto'}",
                f"-I{well_known}",
                f"--python_out={root}",
                f"--pyi_out={root}",
                f"--grpc_python_out={root}",
                *sources,
            ]
        )
        if status != 0:
            raise RuntimeError(f"protoc failed with exit status {status} on {sources}")
