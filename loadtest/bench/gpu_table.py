"""The live table's kernels on a GPU against their floor: events, features, rule bits, sketches.

A floor is the bytes that a kernel must read and write, each once, over the bandwidth of a large copy on the same
device. Scattered accesses count as the bytes used, not as the sectors that they cost, so floors are optimistic. Kernels
run again and again on the same arrays; what fits into the L2 cache stays there and can beat the floor.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from kernels import counters_gpu, fence
from kernels.backend import Backend
from kernels.counters import COUNTERS, LANDMARK_STEP_MS, N_COUNTERS, grow_events
from server.config import RankSettings, TableSettings
from server.live.columns import Columns
from server.live.device import Changes, DeviceTable, Observed
from server.live.features import FeatureSet
from server.rules.rulebook import RuleBook

NOW_MS, LANDMARK_MS = 1_750_000_000_000, 1_750_000_000_000 - 600_000
DIM = 64
SIZES, BATCHES = (100_000, 1_000_000), (100_000, 1_000_000)
RUNS, WARM_RUNS = 30, 3


@dataclass(frozen=True)
class _Case:
    """One measurement. bytes: the floor's. events: per run, 0 for kernels over rows. on_host: host work counts too."""

    kernel: str
    rows: int
    bytes: int
    run: Callable[[], object]
    events: int = 0
    on_host: bool = False


def table_rows(
    backend: Backend,
    copy_bytes_per_s: float,
    sizes: Sequence[int] = SIZES,
    batches: Sequence[int] = BATCHES,
    runs: int = RUNS,
) -> list[dict[str, Any]]:
    """Measures all kernels; one dict each: kernel, n (rows), ms (median), floor_ms, ratio, bytes, runs, and for events
    events and events_per_s.

    Args:
        copy_bytes_per_s: bytes read plus bytes written per second of a large copy on this device.
    """
    measured = []
    for n in sizes:
        for case in _cases(backend, n, batches):
            ms = statistics.median(_milliseconds(backend, case, runs))
            floor_ms = case.bytes / copy_bytes_per_s * 1e3
            row: dict[str, Any] = {"kernel": case.kernel, "n": n, "ms": round(ms, 5)}
            if case.events:
                row |= {"events": case.events, "events_per_s": round(case.events / ms * 1e3)}
            row |= {
                "floor_ms": round(floor_ms, 9), "ratio": round(ms / floor_ms, 2), "bytes": case.bytes, "runs": runs,
            }  # fmt: skip
            measured.append(row)
    return measured


def _milliseconds(backend: Backend, case: _Case, runs: int) -> list[float]:
    """What each run took on the device; with ``on_host``, and on the CPU, by the clock until the device is done."""
    for _ in range(min(WARM_RUNS, runs)):
        case.run()
    if backend.on_gpu and not case.on_host:
        marks = [(torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)) for _ in range(runs)]
        for begin, end in marks:
            begin.record()
            case.run()
            end.record()
        torch.cuda.synchronize()
        return [begin.elapsed_time(end) for begin, end in marks]
    taken_ms = []
    for _ in range(runs):
        begun_s = time.perf_counter()
        case.run()
        if backend.on_gpu:
            torch.cuda.synchronize()
        taken_ms.append((time.perf_counter() - begun_s) * 1e3)
    return taken_ms


def _cases(backend: Backend, n: int, batches: Sequence[int]) -> Iterator[_Case]:
    rng = np.random.default_rng(n)
    device, host = _filled_table(backend, n, rng)
    for events in batches:
        # All streams alike; and one stream that gets everything: the longest walk of the deterministic mode.
        for shape, slots in (
            ("", rng.integers(0, n, events).astype(np.int32)),
            ("_one_row", np.full(events, n // 2, np.int32)),
        ):
            yield from _scatter(device, n, slots, shape)
            yield _observe(device, n, slots, rng, shape)
        yield _apply(device, host, events, rng)
    yield from _features_and_rules(device, n)
    registers, out = device.tensors["viewer_registers"], _room(device, n, np.float32)
    yield _Case("distinct", n, 132 * n, lambda: counters_gpu.estimate_distinct(registers, out=out))
    # Last: it leaves the counters where no other measurement wants them.
    row_bytes = 2 * 4 * N_COUNTERS * counters_gpu.N_HALF_LIVES
    yield _Case("move_landmark", n, row_bytes * n, lambda: device.move_landmark(0, LANDMARK_STEP_MS, n))


def _filled_table(backend: Backend, n: int, rng: np.random.Generator) -> tuple[DeviceTable, Columns]:
    """Every row live, every session column filled; and the host's columns."""
    device = DeviceTable(backend, n)
    c = Columns.allocate(n, rng.standard_normal((n, DIM)).astype(np.float32), with_sessions=False)
    c.state[:], c.epoch[:], c.lease_expires_ms[:] = fence.LIVE, 1, NOW_MS + 15_000
    c.started_ms[:] = NOW_MS - rng.integers(0, 7_200_000, n)
    c.category[:], c.language[:] = rng.integers(1, 20, n), rng.integers(1, 8, n)
    device.upload_rows(np.arange(n, dtype=np.int32), c)
    for name, values in (
        ("counters", rng.random(device.tensors["counters"].shape, np.float32)),
        ("last_event_ms", NOW_MS - rng.integers(0, 60_000, n)),
        ("viewers_ms", NOW_MS - rng.integers(0, 60_000, n)),
        ("viewers", (rng.pareto(1.2, n) * 20).astype(np.float32)),
        ("viewer_registers", rng.geometric(0.5, (n, 128)).astype(np.uint8)),
        ("chatter_registers", rng.geometric(0.5, (n, 128)).astype(np.uint8)),
    ):
        device.tensors[name].copy_(torch.from_numpy(values))
    return device, c


def _put(device: DeviceTable, array: NDArray[Any]) -> torch.Tensor:
    return device.backend.view(device.backend.xp.asarray(array))


def _room(device: DeviceTable, n: int, dtype: type[np.generic]) -> torch.Tensor:
    return device.backend.view(device.backend.xp.empty(n, dtype))


def _scatter(device: DeviceTable, n: int, slots: NDArray[np.int32], shape: str) -> Iterator[_Case]:
    """One chat message per event: one counter, three half-lives."""
    events = len(slots)
    keys = (slots * N_COUNTERS + COUNTERS.index("chatted")).astype(np.int32)
    amounts = np.full((events, 3), 1e-3, np.float32)
    least = events * 16 + len(np.unique(keys)) * 2 * 12
    on_device, added, counters = _put(device, keys), _put(device, amounts), device.tensors["counters"]
    for mode, deterministic in (("fast", False), ("in_order", True)):

        def run(deterministic: bool = deterministic) -> None:
            counters_gpu.scatter_decayed(counters, on_device, added, deterministic=deterministic)

        yield _Case(f"scatter_{mode}{shape}", n, least, run, events)


def _observed(slots: NDArray[np.int32], rng: np.random.Generator) -> Observed:
    """A quarter of the events report viewers; all come from a known viewer; half are chat."""
    events = len(slots)
    return Observed(
        slots,
        NOW_MS + rng.integers(0, 1_000, events),
        np.where(rng.random(events) < 0.25, 100.0, -1.0).astype(np.float32),
        rng.integers(1, 1 << 63, events).astype(np.uint64),
        rng.random(events) < 0.5,
    )


def _observe(
    device: DeviceTable, n: int, slots: NDArray[np.int32], rng: np.random.Generator, shape: str
) -> _Case:  # fmt: skip
    observed = _observed(slots, rng)
    t = device.tensors
    given = [
        _put(device, column.view({"u": np.int64, "b": np.uint8}.get(column.dtype.kind, column.dtype)))
        for column in observed
    ]
    rows = len(np.unique(slots))
    # Times, gauge, and a register of each sketch per event, of which at most all are rows' own.
    least = 25 * len(slots) + rows * 2 * (8 + 8 + 4) + len(slots) * 2

    def run() -> None:
        counters_gpu.observe(
            *given, last_event_ms=t["last_event_ms"], viewers_now=t["viewers"], viewers_ms=t["viewers_ms"],
            viewer_registers=t["viewer_registers"], chatter_registers=t["chatter_registers"], winner=t["winner"],
        )  # fmt: skip

    return _Case(f"observe{shape}", n, least, run, len(slots))


def _apply(device: DeviceTable, host: Columns, events: int, rng: np.random.Generator) -> _Case:
    """Everything: growth and packing on the host, the copy, the kernels. Its floor is the device's alone."""
    n = device.capacity
    slots = rng.integers(0, n, events).astype(np.int32)
    observed = _observed(slots, rng)
    counter, none, ones = np.full(events, 5, np.int8), np.full(events, -1, np.int8), np.ones(events)
    changed = np.unique(slots)[: max(1, events // 10)]

    def run() -> None:
        grown = grow_events(slots, counter, ones, none, ones, observed.time_ms, LANDMARK_MS)
        device.apply(Changes(liveness=changed, grown=grown, observed=observed), host)

    least = events * (16 + 24 + 25) + 58 * len(changed)
    return _Case("apply", n, least, run, events, on_host=True)


def _features_and_rules(device: DeviceTable, n: int) -> Iterator[_Case]:
    features = FeatureSet.load(TableSettings().features_file)
    book = RuleBook.load(RankSettings().rules_file, features.names)
    program = device.load_features(features.program())
    tables = device.load_rules(book.program(features.names), len(features))
    device.set_reported(tables, np.ones(len(features), np.bool_))
    yield _Case(
        "features", n, n * (468 + 5 * len(features)),
        lambda: device.features(program, None, n, NOW_MS, LANDMARK_MS),
    )  # fmt: skip
    values, _ = device.features(program, None, n, NOW_MS, LANDMARK_MS)
    conditions = sum(len(rule.when) for rule in book.rules.values())
    yield _Case("rules", n, n * (4 * conditions + 26), lambda: device.assess(values, None, tables, NOW_MS))
