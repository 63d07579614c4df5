"""`liverank model`: its subcommands, one line each. A module is imported only when its command is asked for."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from importlib import import_module

COMMANDS: dict[str, tuple[str, str]] = {
    # name: (module with add_arguments(parser, name) and run(options) -> exit status, help)
    "export": ("models.export_command", "write trained weights as ONNX into a model repository, checked against torch"),
    "evaluate": ("models.evaluate_command", "a model against every formula on the last 30 %% of a history's time"),
    "train-growth": ("models.evaluate_command", "train the growth recipe on a history and write it as ONNX"),
    "push": ("server.model_client", "load a version on a running server and warm it; nobody is served by it yet"),
    "list": ("server.model_client", "versions, what serves, how a trial goes, and who did what"),
    "diff": ("server.model_client", "two versions: metrics, and how far they agree on rows that were really scored"),
    "shadow": ("server.model_client", "score a share of the traffic by the pushed version; nobody sees it"),
    "canary": ("server.model_client", "serve 1, 10, then 100 %% of the viewers by it; ends itself on guardrails"),
    "promote": ("server.model_client", "serve everybody by it, in one step"),
    "rollback": ("server.model_client", "end the trial, or go back to the version before, within a second"),
}


def add_model(commands: argparse._SubParsersAction[argparse.ArgumentParser], arguments: Sequence[str]) -> None:
    """The group. Only the command that ``arguments`` name gets its options, so that the others are not imported."""
    model = commands.add_parser("model", help="other versions of a model into service, and back; see docs/models.md")
    actions = model.add_subparsers(dest="action", required=True)
    for name, (module, help_text) in COMMANDS.items():
        parser = actions.add_parser(name, help=help_text)
        if list(arguments[:2]) == ["model", name]:
            import_module(module).add_arguments(parser, name)


def run_model(options: argparse.Namespace) -> int:
    """Runs ``options.action``."""
    status: int = import_module(COMMANDS[options.action][0]).run(options)
    return status
