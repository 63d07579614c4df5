"""`liverank model push · list · diff · shadow · canary · promote · rollback`: steps asked of a running server."""

from __future__ import annotations

import argparse
import json
import math
import re
import sys
import time
from collections.abc import Callable
from pathlib import Path

import grpc
from google.protobuf.json_format import MessageToDict
from liverank.v1 import admin_pb2 as pb
from liverank.v1 import admin_pb2_grpc as pb_grpc
from rich.console import Console
from rich.table import Table

from server.channel import client_settings, open_channel
from server.client_options import SECURITY, add_server_options
from server.errors import ConfigError

TIMEOUT_S, PUSH_TIMEOUT_S = 15.0, 180.0
FILES = ("model.onnx", "model.plan", "metrics.json")
_NAMED = re.compile(r"([A-Za-z0-9_.-]+)/([0-9]{1,9})")


def add_arguments(parser: argparse.ArgumentParser, name: str) -> None:
    """Options of one of the commands."""
    add_server_options(parser)
    version = "MODEL/VERSION, such as trendiness/2"
    if name == "push":
        parser.add_argument("version", help=f"{version}, if the server's repository has it; or its folder, to be sent")
    elif name in ("shadow", "canary", "promote"):
        parser.add_argument("version", help=version)
    elif name == "diff":
        parser.add_argument("first", help=version)
        parser.add_argument("second")
    else:
        parser.add_argument("model", nargs="?", default="", help="such as trendiness; needed where there are several")
    if name not in ("list", "diff"):
        parser.add_argument("--why", required=True, help="the reason; it is kept in the audit log")
    if name == "shadow":
        parser.add_argument("--percent", type=float, default=100.0, help="of the traffic")
        parser.add_argument("--watch", type=float, default=0.0, metavar="SECONDS", help="print how far it agrees")
    if name == "canary":
        parser.add_argument("--percent", type=float, required=True, help="of the viewers: 1, 10 or 100")
        parser.add_argument("--hold", type=float, default=0.0, metavar="SECONDS", help="then the next step by itself")
        parser.add_argument("--watch", type=float, default=0.0, metavar="SECONDS", help="print how it goes")
    if name == "promote":
        parser.add_argument("--force", action="store_true", help="without a canary of 100 %%")
    if name == "list":
        parser.add_argument("--history", type=int, default=10, help="audit entries shown")
        parser.add_argument("--json", action="store_true", help="one line of JSON instead of tables")


def run(options: argparse.Namespace) -> int:
    """Asks ``options.server``; 0 when it was done, 1 with the reason when it was refused.

    Raises:
        ConfigError: a version or file cannot be read, or the options about TLS and token do not fit.
    """
    request = _REQUESTS[options.action](options)
    security = client_settings(**{name: getattr(options, name) for name in SECURITY})
    # A model comes as one message.
    with open_channel(options.server, security, [("grpc.max_send_message_length", -1)]) as channel:
        try:
            return _asked(options, pb_grpc.AdminStub(channel), request)
        except grpc.RpcError as error:
            print(f"liverank: {options.server}: {error.code().name}: {error.details()}", file=sys.stderr)
            return 1


def _asked(options: argparse.Namespace, stub: pb_grpc.AdminStub, request: object) -> int:
    if options.action == "list":
        _print_models(stub.ListModels(request, timeout=TIMEOUT_S), options.json)
        return 0
    if options.action == "diff":
        _print_diff(options, stub.DiffModels(request, timeout=PUSH_TIMEOUT_S))
        return 0
    if options.action == "push":
        pushed = stub.PushModel(request, timeout=PUSH_TIMEOUT_S)
        _print_rollout(pushed.rollout)
        print("metrics: " + (_metrics(pushed.version) or "none"))
        return 0
    began_s = time.monotonic()
    method = {
        "shadow": stub.ShadowModel, "canary": stub.CanaryModel, "promote": stub.PromoteModel,
        "rollback": stub.RollbackModel,
    }[options.action]  # fmt: skip
    rollout = method(request, timeout=TIMEOUT_S).rollout
    _print_rollout(rollout)
    print(f"done in {(time.monotonic() - began_s) * 1000:.0f} ms")
    if getattr(options, "watch", 0.0) > 0.0:
        return _watch(stub, rollout, options.watch)
    return 0


# --- what is asked ----------------------------------------------------------------------------


def named(text: str) -> tuple[str, int]:
    """(model, version) of "trendiness/2". Raises ConfigError."""
    found = _NAMED.fullmatch(text)
    if found is None:
        raise ConfigError(f"MODEL/VERSION wanted, such as trendiness/2, got {text!r}")
    return found[1], int(found[2])


def _push(options: argparse.Namespace) -> pb.PushModelRequest:
    folder = Path(options.version)
    if not folder.is_dir():
        model, version = named(options.version)
        return pb.PushModelRequest(model=model, version=version, why=options.why)
    folder = folder.resolve()
    model, version = named(f"{folder.parent.name}/{folder.name}")
    try:
        files = [
            pb.ModelFile(name=name, content=(folder / name).read_bytes()) for name in FILES if (folder / name).is_file()
        ]
    except OSError as error:
        raise ConfigError(f"{error.filename}: {error.strerror}") from error
    if not files:
        raise ConfigError(f"{folder}: holds none of {', '.join(FILES)}")
    return pb.PushModelRequest(model=model, version=version, files=files, why=options.why)


def _shadow(options: argparse.Namespace) -> pb.ShadowModelRequest:
    model, version = named(options.version)
    return pb.ShadowModelRequest(model=model, version=version, percent=options.percent, why=options.why)


def _canary(options: argparse.Namespace) -> pb.CanaryModelRequest:
    model, version = named(options.version)
    hold_ms = round(max(0.0, options.hold) * 1000)
    return pb.CanaryModelRequest(
        model=model, version=version, percent=options.percent, hold_ms=hold_ms, why=options.why
    )


def _promote(options: argparse.Namespace) -> pb.PromoteModelRequest:
    model, version = named(options.version)
    return pb.PromoteModelRequest(model=model, version=version, force=options.force, why=options.why)


def _diff(options: argparse.Namespace) -> pb.DiffModelsRequest:
    (model, first), (other, second) = named(options.first), named(options.second)
    if model != other:
        raise ConfigError(f"two versions of one model wanted, got {options.first} and {options.second}")
    return pb.DiffModelsRequest(model=model, first=first, second=second)


_REQUESTS: dict[str, Callable[[argparse.Namespace], object]] = {
    "push": _push,
    "shadow": _shadow,
    "canary": _canary,
    "promote": _promote,
    "diff": _diff,
    "rollback": lambda options: pb.RollbackModelRequest(model=options.model, why=options.why),
    "list": lambda options: pb.ListModelsRequest(model=options.model, history=max(0, options.history)),
}

# --- what is shown ----------------------------------------------------------------------------


def _print_rollout(rollout: pb.Rollout) -> None:
    serving = f"{rollout.model}/{rollout.serving}" if rollout.serving else "the newest version"
    answering = f"{rollout.model}/{rollout.answering}" if rollout.answering else "no model"
    told = [f"serving: {serving}", f"scores in use: {answering}"]
    if rollout.previous:
        told.append(f"before it: {rollout.model}/{rollout.previous}")
    if rollout.candidate:
        share = f" at {rollout.percent:g} %" if rollout.percent else ""
        told.append(f"candidate: {rollout.model}/{rollout.candidate}, {rollout.stage}{share}")
    print("; ".join(told))


def _print_models(reply: pb.ListModelsResponse, as_json: bool) -> None:
    if as_json:
        print(json.dumps(MessageToDict(reply, preserving_proto_field_name=True)))
        return
    console = Console(highlight=False)
    for model in reply.models:
        _print_rollout(model.rollout)
        versions = Table("version", "role", "metrics", "commit", "feature schema")
        for version in model.versions:
            told = version.problem or _metrics(version)
            roles = ", ".join(version.roles)
            versions.add_row(str(version.version), roles, told, version.commit, version.feature_schema)
        console.print(versions)
        if model.HasField("trial"):
            print(_trial_line(model))
        for entry in model.history:
            why = entry.why if not entry.detail else f"{entry.why} ({entry.detail})"
            step = f"{entry.step} {model.rollout.model}/{entry.version}"
            print(f"{entry.at}  {entry.who}  {step}  {entry.outcome}: {why}")


def _trial_line(model: pb.Model) -> str:
    trial, found = model.trial, model.trial.agreement
    return (
        f"{model.rollout.stage} {model.rollout.percent:g} %: {trial.refreshes} refreshes compared, {trial.failures} "
        f"failed; rank correlation {_number(found.rank_correlation)}, top 10 {_share(found.top10)}, top 100 "
        f"{_share(found.top100)}, mean score {_number(found.mean_candidate)} against {_number(found.mean_serving)} "
        f"(drift {_share(trial.drift)}), calibration gap {_number(found.calibration_gap)}; "
        f"{trial.candidate_seconds * 1000:.1f} ms against {trial.serving_seconds * 1000:.1f} ms per refresh; "
        f"{trial.viewers_served} viewers served, {trial.candidate.dead} of {trial.candidate.impressions} impressions "
        f"dead ({trial.serving.dead} of {trial.serving.impressions})"
    )


def _watch(stub: pb_grpc.AdminStub, rollout: pb.Rollout, seconds: float) -> int:
    """A line per second; 1 when the trial ended meanwhile by itself."""
    ends_at_s = time.monotonic() + seconds
    while (left_s := ends_at_s - time.monotonic()) > 0:
        time.sleep(min(1.0, left_s))
        request = pb.ListModelsRequest(model=rollout.model, history=1)
        model = stub.ListModels(request, timeout=TIMEOUT_S).models[0]
        if model.rollout.candidate != rollout.candidate:
            last = model.history[-1] if model.history else pb.AuditEntry()
            print(f"the trial is over: {last.step} by {last.who}: {last.why}")
            return 0 if last.step == "promote" else 1
        print(_trial_line(model), flush=True)
    return 0


def _print_diff(options: argparse.Namespace, found: pb.DiffModelsResponse) -> None:
    table = Table("", options.first, options.second)
    table.add_row("commit", found.first.commit, found.second.commit)
    table.add_row("feature schema", found.first.feature_schema, found.second.feature_schema)
    for name in sorted({*found.first.metrics, *found.second.metrics}):
        values = [
            _number(version.metrics[name]) if name in version.metrics else "" for version in (found.first, found.second)
        ]
        table.add_row(name, *values)
    Console(highlight=False).print(table)
    if not found.HasField("agreement"):
        print("scores not compared: one of them is no ONNX file")
        return
    a = found.agreement
    print(
        f"on {a.rows} rows that were scored: rank correlation {_number(a.rank_correlation)}, top 10 {_share(a.top10)}, "
        f"top 100 {_share(a.top100)}, mean score {_number(a.mean_serving)} and {_number(a.mean_candidate)}, "
        f"calibration gap {_number(a.calibration_gap)}"
    )


def _metrics(version: pb.ModelVersion) -> str:
    return ", ".join(f"{name} {value:.4g}" for name, value in sorted(version.metrics.items()))


def _number(value: float) -> str:
    return f"{value:.4g}" if math.isfinite(value) else "unknown"


def _share(value: float) -> str:
    return f"{value:.1%}" if math.isfinite(value) else "unknown"
