"""`liverank rank` and `liverank explain`: ask a running server, read the answer as a table."""

from __future__ import annotations

import argparse
import sys

import grpc
from liverank.v1 import ranking_pb2 as pb
from liverank.v1 import ranking_pb2_grpc as pb_grpc
from rich.console import Console
from rich.table import Table

from server.channel import client_settings, open_channel
from server.client_options import SECURITY


def run_client(options: argparse.Namespace) -> int:
    """Asks ``options.server``; 0 when it answered, 1 with the status and message when it did not.

    Raises:
        ConfigError: the options and LIVERANK_CLIENT__* variables about TLS and token do not fit.
    """
    request = pb.RankRequest(
        viewer_id=options.viewer,
        surface=options.surface,
        limit=options.limit,
        languages=options.languages,
        categories=options.categories,
        region=options.region,
    )
    security = client_settings(**{name: getattr(options, name) for name in SECURITY})
    with open_channel(options.server, security) as channel:
        stub = pb_grpc.RankingStub(channel)
        try:
            if options.command == "rank":
                _print_slate(stub.Rank(request, timeout=5.0))
            else:
                wanted = pb.ExplainRequest(request=request, stream_id=options.stream_id)
                _print_explanation(stub.Explain(wanted, timeout=5.0))
        except grpc.RpcError as error:
            print(f"liverank: {options.server}: {error.code().name}: {error.details()}", file=sys.stderr)
            return 1
    return 0


def source_names(reply: pb.RankResponse, stream: pb.RankedStream) -> list[str]:
    """Names of the sources that proposed a stream."""
    return [name for bit, name in enumerate(reply.source_names) if stream.sources >> bit & 1]


def _print_slate(reply: pb.RankResponse) -> None:
    level = pb.Degradation.Level.Name(reply.degradation.level)
    table = Table(title=f"{reply.model_version} · degradation {level} · offset {reply.applied_offset}")
    for name in ("rank", "stream", "score", "epoch", "why"):
        table.add_column(name, justify="right" if name in ("rank", "score", "epoch") else "left")
    for place, stream in enumerate(reply.streams, 1):
        why = source_names(reply, stream) + (["exploration"] if stream.exploration else [])
        table.add_row(str(place), stream.stream_id, f"{stream.score:.3f}", str(stream.epoch), ", ".join(why))
    Console().print(table)
    for reason in reply.degradation.reasons:
        print(f"degraded: {reason}")


def _print_explanation(found: pb.ExplainResponse) -> None:
    console = Console()
    shown = f"place {found.position_in_slate}" if found.position_in_slate else "not shown"
    why = f": {found.not_shown_reason}" if found.not_shown_reason else ""
    console.print(f"{found.stream_id} epoch {found.epoch} {found.state}: {shown}{why}")
    console.print(f"sources: {', '.join(found.sources) or 'none'}; place by utility {found.position_before_slate}")
    scores = Table("score", "value", "age ms")
    for score in found.scores:
        scores.add_row(score.name, f"{score.value:.4f}", str(score.age_ms))
    rules = Table("rule", "excluded", "boost")
    for rule in found.rules:
        rules.add_row(rule.rule, "yes" if rule.excluded else "", f"{rule.boost:+.2f}" if rule.boost else "")
    features = Table("feature", "value", "state")
    for feature in found.features:
        state = pb.FeatureValue.State.Name(feature.state).lower()
        features.add_row(feature.name, f"{feature.value:.4g}", state)
    for table in (scores, rules, features):
        console.print(table)
