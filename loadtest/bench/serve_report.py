"""Prints what `bench serve` measured: tables for people, then one line of JSON."""

from __future__ import annotations

import json
from typing import Any

from rich.console import Console
from rich.table import Table

from loadtest.bench.contestants import CONSTANT, OURS, OURS_RANKED, TEXTBOOK, TEXTBOOK_RANKED, THREADS


def print_result(result: dict[str, Any]) -> None:
    """Tables, then the JSON as the last line."""
    console = Console(width=150)
    console.print(_grid(result["rows"]))
    console.print(_batches(result["batch_rows"]))
    if edges := result["edges"]:
        console.print(
            f"Behind {edges['edges']} edges, {result['concurrency']} callers: {edges['rps']:,}/s, "
            f"{edges['cpu_ms_per_reply']:.3f} ms CPU per reply in all processes, the engine's share "
            f"{edges['engine_share']:.0%}.",
            highlight=False,
        )
    console.print(_open_loop(result))
    console.print(_with_ranker(result["with_ranker"]))
    console.print(
        f"CPU is the server's, ms per reply. Floor: {result['floor']}. {result['machine']}, commit "
        f"{result['commit']}; the client {result['client']}; load average before: {result['load_average_before']}.",
        highlight=False,
    )
    print(json.dumps(result))


def _grid(rows: list[dict[str, Any]]) -> Table:
    table = Table(title="Rank, 50 results, viewer embedding, one in three filtered; closed loop, servers taking turns")
    for title in (
        "live", "callers", "ours/s", "CPU", "p50", "p99", "ceiling/s", "CPU", "ours ÷ ceiling", "grpcio's", "ours ÷ it",
        "textbook/s", "CPU", "p50", "p99", "textbook ÷ ours", "lean",
    ):  # fmt: skip
        table.add_column(title, justify="right")
    for row in rows:
        ours, ceiling, textbook = row[OURS], row[CONSTANT], row[TEXTBOOK]
        table.add_row(
            f"{row['streams']:,}", str(row["concurrency"]),
            f"{ours['rps']:,}", f"{ours['cpu_ms_per_reply']:.3f}", f"{ours['p50_ms']:.1f}", f"{ours['p99_ms']:.1f}",
            f"{ceiling['rps']:,}", f"{ceiling['cpu_ms_per_reply']:.3f}", f"{row['ceiling_cpu_ratio']:.2f}",
            f"{row[THREADS]['cpu_ms_per_reply']:.3f}", f"{row['threads_cpu_ratio']:.2f}",
            f"{textbook['rps']:,}", f"{textbook['cpu_ms_per_reply']:.3f}",
            f"{textbook['p50_ms']:.1f}", f"{textbook['p99_ms']:.1f}", f"{row['speedup']:.2f}",
            f"{row['speedup_lean']:.2f}" if "speedup_lean" in row else "",
        )  # fmt: skip
    return table


def _batches(rows: list[dict[str, Any]]) -> Table:
    table = Table(title="RankBatch of ours; floor of the comparison: the textbook server's Rank at most callers")
    for title in ("live", "viewers/call", "slates/s", "CPU per slate", "textbook ÷ ours"):
        table.add_column(title, justify="right")
    for row in rows:
        table.add_row(
            f"{row['streams']:,}", str(row["viewers_per_call"]), f"{row['slates_per_s']:,}",
            f"{row['cpu_ms_per_slate']:.3f}", f"{row['batch_speedup']:.2f}",
        )  # fmt: skip
    return table


def _open_loop(result: dict[str, Any]) -> Table:
    table = Table(title=f"Open loop at {result['streams']:,} live: constant arrivals, ms from when a request was due")
    for title in ("server", "arrivals/s", "achieved/s", "p50", "p90", "p99", "max", "unsent", "errors"):
        table.add_column(title, justify="right")
    for row in result["open_loop"]:
        table.add_row(
            row["server"], f"{row['arrivals_per_s']:,}", f"{row['achieved_per_s']:,}",
            *(f"{row[key]:.1f}" for key in ("p50_ms", "p90_ms", "p99_ms", "max_ms")),
            str(row["unsent"]), str(row["errors"] or ""),
        )  # fmt: skip
    ratios = ", ".join(f"{ratio:.1f} at {share}" for share, ratio in result["p99_ratio"].items())
    table.caption = f"p99, textbook ÷ ours, by share of the textbook server's replies/s: {ratios}"
    return table


def _with_ranker(result: dict[str, Any]) -> Table:
    alone = ", ".join(f"{viewers}: {ms:.3f}" for viewers, ms in result["model_cpu_ms_per_viewer"].items())
    table = Table(
        title=f"A model viewer x stream per request, {result['streams']:,} live, {result['candidates']} candidates. "
        f"The model alone, CPU ms per viewer by viewers per call: {alone}"
    )
    for title in (
        "callers", "ours/s", "CPU", "p50", "p99", "by the model", "grpcio's", "goal", "ours ÷ goal", "textbook/s",
        "CPU", "p50", "p99", "textbook ÷ ours",
    ):  # fmt: skip
        table.add_column(title, justify="right")
    for row in result["rows"]:
        ours, textbook = row[OURS_RANKED], row[TEXTBOOK_RANKED]
        table.add_row(
            str(row["concurrency"]),
            f"{ours['rps']:,}", f"{ours['cpu_ms_per_reply']:.3f}", f"{ours['p50_ms']:.1f}", f"{ours['p99_ms']:.1f}",
            f"{row['by_model']:.1%}", f"{row[THREADS]['cpu_ms_per_reply']:.3f}",
            f"{row['goal_cpu_ms_per_reply']:.3f}", f"{row['over_goal']:.2f}",
            f"{textbook['rps']:,}", f"{textbook['cpu_ms_per_reply']:.3f}",
            f"{textbook['p50_ms']:.1f}", f"{textbook['p99_ms']:.1f}", f"{row['speedup']:.2f}",
        )  # fmt: skip
    return table
