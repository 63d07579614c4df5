"""Where engine and edges find each other: Unix sockets in a folder that only this user may enter."""

from __future__ import annotations

from pathlib import Path


def engine_address(folder: Path) -> str:
    """The engine's gRPC port, for everything but ranking."""
    return f"unix:{folder / 'engine.sock'}"


def rings_path(folder: Path) -> Path:
    """The socket over which edges hand their rings to the engine."""
    return folder / "rings.sock"
