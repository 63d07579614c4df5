"""What the demo shows: the feed as a table, and what vanished from it since the last one."""

from __future__ import annotations

import threading
from collections.abc import Iterable

import grpc
from liverank.v1 import liveness_pb2 as live_pb
from liverank.v1 import liveness_pb2_grpc as live_grpc
from liverank.v1 import ranking_pb2 as pb
from liverank.v1 import ranking_pb2_grpc as pb_grpc
from rich.console import Console
from rich.table import Table

from loadtest.demo.platform import Platform

ROWS = 10
# (feature, value from which it is worth saying, how it is said); the strongest come first
_REASONS = (
    ("viewers_velocity", 1.15, "viewers x{:.1f}"),
    ("joins_velocity", 1.25, "joins x{:.1f}"),
    ("chats_velocity", 1.25, "chats x{:.1f}"),
    ("likes_velocity", 1.25, "likes x{:.1f}"),
    ("joins_per_minute_1m", 5.0, "{:.0f} joins/min"),
    ("purchases_per_minute_5m", 1.0, "{:.0f} sold/min"),
    ("bids_per_minute_1m", 1.0, "{:.0f} bids/min"),
    ("chats_per_minute_1m", 10.0, "{:.0f} chats/min"),
    ("likes_per_viewer_5m", 0.5, "{:.1f} likes/viewer/min"),
)


class Screen:
    """Prints the feed of an anonymous viewer, and the ends that WatchEnded tells of."""

    def __init__(self, platform: Platform, channel: grpc.Channel, console: Console) -> None:
        self._platform, self._console = platform, console
        self._ranking = pb_grpc.RankingStub(channel)
        self._watch = live_grpc.LivenessStub(channel).WatchEnded(live_pb.WatchEndedRequest())
        self._watch.initial_metadata()  # subscribed: from here on no end is missed
        self._ended: list[live_pb.EndedStream] = []
        self._before: dict[str, int] = {}
        self._thread = threading.Thread(target=self._listen, name="watch-ended", daemon=True)
        self._thread.start()

    def close(self) -> None:
        self._watch.cancel()
        self._thread.join(5)

    def _listen(self) -> None:
        try:
            for end in self._watch:
                self._ended.append(end)
        except grpc.RpcError as error:
            if error.code() is not grpc.StatusCode.CANCELLED:  # ours, at the end
                self._console.print(f"WatchEnded stopped: {error.code().name}: {error.details()}")

    def show(self, second: float) -> None:
        """One table."""
        request = pb.RankRequest(request_id=f"screen-{second:.0f}", limit=ROWS)
        reply = self._ranking.Rank(request, timeout=5.0)
        level = pb.Degradation.Level.Name(reply.degradation.level)
        table = Table(
            title=f"{second:3.0f} s · trending now · {reply.model_version} · degradation {level}",
            title_justify="left",
        )
        for name, right, least in (
            ("rank", 1, 4), ("", 0, 4), ("title", 0, 36), ("viewers", 1, 7), ("trend", 1, 8), ("why", 0, 42),
        ):  # fmt: skip
            table.add_column(name, justify="right" if right else "left", no_wrap=True, width=least)
        for place, stream in enumerate(reply.streams, 1):
            table.add_row(*self._row(request, place, stream))
        self._console.print(table)
        for reason in reply.degradation.reasons:
            self._console.print(f"  degraded: {reason}", markup=False)
        self._show_vanished({s.stream_id for s in reply.streams})
        self._before = {s.stream_id: place for place, s in enumerate(reply.streams, 1)}

    def _row(self, request: pb.RankRequest, place: int, stream: pb.RankedStream) -> Iterable[str]:
        wanted = pb.ExplainRequest(request=request, stream_id=stream.stream_id)
        found = self._ranking.Explain(wanted, timeout=5.0)
        value = {f.name: f.value for f in found.features}
        trend = next((s.value for s in found.scores if s.name == "trend"), float("nan"))
        why = ["exploring"] if stream.exploration else []
        why += [r.rule.replace("_", " ") for r in found.rules if r.boost]
        signals = sorted(_REASONS, key=lambda reason: value[reason[0]] / reason[1], reverse=True)
        why += [text.format(value[name]) for name, least, text in signals if value[name] >= least]
        if not why:
            why = [source.replace("_", " ") for source in found.sources[:2]]
        before = self._before.get(stream.stream_id)
        move = "new" if before is None else "" if before == place else "up" if before > place else "down"
        title = self._platform.title(stream.stream_id)
        return (
            str(place), move if self._before else "", title, f"{value['viewers']:,.0f}",
            "unscored" if trend != trend else f"{trend:.3f}", ", ".join(why[:3]),
        )  # fmt: skip

    def _show_vanished(self, shown: set[str]) -> None:
        """The ends since the last table: how many, and those that were on screen then."""
        ended, self._ended = self._ended, []
        if not ended:
            return
        silent = sum(end.reason == "lease_expired" for end in ended)
        self._console.print(
            f"  {len(ended)} streams ended since the last table, {silent} of them without saying so",
            style="dim",
        )
        for end in ended:
            place = self._before.get(end.stream_id)
            if place is not None and end.stream_id not in shown:
                why = "fell silent, lease ran out" if end.reason == "lease_expired" else "ended"
                title = self._platform.title(end.stream_id)
                self._console.print(f"  gone from place {place}: {title} ({why})", markup=False)
