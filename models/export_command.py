"""`liverank model export`: trained weights → MODEL_REPOSITORY/NAME/VERSION/, as ONNX, checked against torch."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from server.errors import ConfigError


def add_arguments(parser: argparse.ArgumentParser, name: str) -> None:
    """The command's own options."""
    parser.add_argument("weights", type=Path, help="weights.npz, as training writes it")
    parser.add_argument("--version", type=int, required=True, help="folder to write; one that is there is replaced")
    parser.add_argument("--out", type=Path, default=Path("model_repository"), help="model repository")


def run(options: argparse.Namespace) -> int:
    """Prints where it is and, last, a line of JSON.

    Raises:
        ConfigError: the weights cannot be read, the packages of training are missing, or graph and torch differ.
    """
    if options.version < 1:
        raise ConfigError(f"--version: 1 or more wanted, got {options.version}")
    try:
        from models.export import ExportMismatch, publish
        from models.weights import load_weights
    except ImportError as error:
        raise ConfigError(f"export needs torch and onnx: pip install 'liverank[train]' ({error})") from error

    found = load_weights(options.weights)
    try:
        folder = publish(
            options.out, options.version, found.model, found.schema, found.sample, found.facts, found.headline
        )  # fmt: skip
    except ExportMismatch as error:
        raise ConfigError(f"{options.weights}: {error}; nothing was written") from error
    facts = json.loads((folder / "metrics.json").read_text())
    revision = facts["commit"] or "unknown"
    print(f"wrote {folder}: {found.model_name} for feature schema {found.schema}, commit {revision}")
    print(f"ONNX and torch differ by {facts['onnx_difference']:.2g} at most on {facts['onnx_checked_rows']} rows")
    told = {"folder": str(folder), "onnx_difference": facts["onnx_difference"], "headline": facts["headline"]}
    print(json.dumps(told))
    return 0
