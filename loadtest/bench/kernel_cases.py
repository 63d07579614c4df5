"""What `bench kernels` measures: every kernel on a synthetic table, and the least each must do.

Bytes are those a kernel cannot avoid: its inputs read once and its outputs written once. Scattered reads count as
the bytes used, not as the cache lines they cost, so the floors are optimistic.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from kernels import fence
from kernels.blend import BlendWeights, blend
from kernels.counters import COUNTERS, scatter_decayed
from kernels.dedup import WORDS
from kernels.eligibility import FilterColumns, RowColumns, check_rows
from kernels.groups import by_group, first_of_groups
from kernels.idmap import IdMap
from kernels.int8_rows import Int8Rows
from kernels.merge import merge_candidates
from kernels.sessions import estimate_distinct, observe
from kernels.slate import select_slates
from kernels.topk import masked_topk
from kernels.topk_int8 import masked_topk_int8
from kernels.vectors import has_int8_dots
from kernels.verify import verify_picks
from kernels.wire import encode_streams
from loadtest.bench.synthetic import CATEGORIES, DIM, LANGUAGES, LEASE_MS, NOW_MS, Bench
from server.rules.bits import assess

TOP_K, ELIGIBLE_SHARE = 500, 0.6
CANDIDATES, LIMIT, RESERVE = 600, 50, 20
PROPOSALS, PROPOSALS_EXCLUDED = 800, 20
EVENTS = 10_000


def _nothing() -> None:
    """No preparation."""


@dataclass(frozen=True)
class Case:
    """One measurement. ``prepare`` runs before every ``run``, untimed.

    n: rows of the table. bytes: what a run must move at least. batch: queries, 0 where there are none.
    events: per run, 0 for other kernels. bare: the arithmetic alone, where that and not memory is the floor.
    """

    kernel: str
    n: int
    bytes: int
    run: Callable[[], object]
    batch: int = 0
    events: int = 0
    bare: Callable[[], object] | None = None
    prepare: Callable[[], object] = _nothing


def cases(n: int, batches: tuple[int, ...]) -> Iterator[Case]:
    """All measurements on a table of ``n`` rows; those of requests once per batch size."""
    bench = Bench(n)
    for batch in batches:
        yield _retrieve(bench, batch)
        if has_int8_dots():
            yield _retrieve_float32(bench, batch)
    for make in (_merge, _blend, _slate, _verify, _encode):
        for batch in batches:
            yield make(bench, batch)
    for make_whole in (_eligible, _groups, _lookup, _distinct, _features, _rules, _fence, _scatter, _observe):
        yield make_whole(bench)


def _retrieve(bench: Bench, batch: int) -> Case:
    """As the exact engine searches on this CPU: over an int8 copy that is kept, where it is made for that."""
    if not has_int8_dots():
        return _retrieve_float32(bench, batch, "retrieve")
    rows = Int8Rows(bench.n, DIM)
    rows.write(bench.slots, bench.columns.embedding)
    return _search(bench, batch, "retrieve", lambda *search: masked_topk_int8(*search[:2], rows, *search[2:]))


def _retrieve_float32(bench: Bench, batch: int, kernel: str = "retrieve_float32") -> Case:
    return _search(bench, batch, kernel, masked_topk)


def _search(bench: Bench, batch: int, kernel: str, search: Callable[..., object]) -> Case:
    queries, table = bench.queries(batch), bench.columns.embedding
    eligible = bench.rng.random((1, bench.n)) < ELIGIBLE_SHARE
    mask_of = np.zeros(batch, np.int32)
    out = np.empty((batch, bench.n), np.float32)
    return Case(
        kernel, bench.n, table.nbytes, lambda: search(queries, table, eligible, mask_of, TOP_K),
        batch=batch, bare=lambda: np.matmul(queries, table.T, out=out),
    )  # fmt: skip


def _merge(bench: Bench, batch: int) -> Case:
    slots = bench.rng.integers(0, bench.n, batch * PROPOSALS).astype(np.int32)
    sources = np.uint32(1) << bench.rng.integers(0, 6, len(slots)).astype(np.uint32)
    offsets = np.arange(batch + 1, dtype=np.int64) * PROPOSALS
    excluded = slots[:: PROPOSALS // PROPOSALS_EXCLUDED].copy()
    excluded_offsets = np.arange(batch + 1, dtype=np.int64) * PROPOSALS_EXCLUDED
    return Case(
        "merge", bench.n, 16 * len(slots) + 4 * len(excluded),
        lambda: merge_candidates(slots, sources, offsets, excluded, excluded_offsets, bench.n), batch=batch,
    )  # fmt: skip


def _blend(bench: Bench, batch: int) -> Case:
    slots = bench.distinct(batch, CANDIDATES)
    sources = bench.rng.integers(0, 64, slots.shape).astype(np.uint32)
    trend, boost = bench.rng.random(bench.n).astype(np.float32), np.zeros(bench.n, np.float32)
    weights = BlendWeights(*(np.full(batch, w, np.float32) for w in (1.0, 0.5, 0.3, 0.1, 0.2, 1.0)))
    queries, c = bench.queries(batch), bench.columns
    return Case(
        "blend", bench.n, slots.size * (8 + 16 + 4 * DIM + 8),
        lambda: blend(
            slots, sources, queries, trend, boost, c.started_ms, c.embedding, weights,
            followed_bit=8, fresh_bit=16, now_ms=NOW_MS, fresh_age_ms=600_000,
        ),
        batch=batch,
    )  # fmt: skip


def _slate(bench: Bench, batch: int) -> Case:
    slots = bench.distinct(batch, CANDIDATES)
    utility = bench.rng.random(slots.shape).astype(np.float32)
    explorable = bench.rng.random(slots.shape) < 0.1
    c = bench.columns

    def column(value: int) -> NDArray[np.int32]:
        return np.full(batch, value, np.int32)

    limits, explore, creator_caps, category_caps = column(LIMIT), column(4), column(2), column(LIMIT // 2)
    seeds, diversity = np.arange(batch, dtype=np.uint64), np.full(batch, 0.15, np.float32)
    # Candidates once, and the embedding of each pick: the cosines that a choice needs beyond that vary.
    return Case(
        "slate", bench.n, 14 * slots.size + batch * (LIMIT + RESERVE) * (4 * DIM + 8),
        lambda: select_slates(
            slots, utility, explorable, c.creator, c.category, c.embedding, c.ids, limits, explore, seeds,
            creator_caps, category_caps, diversity, RESERVE,
        ),
        batch=batch,
    )  # fmt: skip


def _filters() -> FilterColumns:
    """One filter: three languages, every category."""
    languages = np.zeros((1, LANGUAGES), np.bool_)
    languages[0, 1:4] = True
    categories = np.zeros((1, CATEGORIES), np.bool_)
    age = np.full(1, 18, np.int32)
    return FilterColumns(np.zeros(1, np.int32), age, np.zeros(1, np.bool_), languages, np.ones(1, np.bool_), categories)


def _row_columns(bench: Bench) -> RowColumns:
    c = bench.columns
    bits = np.zeros(bench.n, np.uint32)
    return RowColumns(c.state, c.lease_expires_ms, bits, c.region, c.age_rating, c.language, c.category)


def _verify(bench: Bench, batch: int) -> Case:
    picks = bench.distinct(batch, LIMIT + RESERVE)
    n_picks, limits = np.full(batch, LIMIT + RESERVE, np.int32), np.full(batch, LIMIT, np.int32)
    filter_of, rows, filters = np.zeros(batch, np.int32), _row_columns(bench), _filters()
    return Case(
        "verify", bench.n, picks.size * (4 + 29 + 5),
        lambda: verify_picks(picks, n_picks, limits, filter_of, rows, filters, bench.book.exclude_bits, NOW_MS),
        batch=batch,
    )  # fmt: skip


def _encode(bench: Bench, batch: int) -> Case:
    slots, c = bench.distinct(batch, LIMIT), bench.columns
    counts, scores = np.full(batch, LIMIT, np.int32), bench.rng.random(slots.shape).astype(np.float32)
    sources, exploration = np.ones(slots.shape, np.uint32), np.zeros(slots.shape, np.float32)
    written = 37 + int(c.id_lengths[0])
    return Case(
        "encode", bench.n, slots.size * (16 + 17 + int(c.id_lengths[0]) + written),
        lambda: encode_streams(
            slots, counts, scores, c.epoch, c.lease_expires_ms, sources, exploration, c.ids, c.id_lengths
        ),
        batch=batch,
    )  # fmt: skip


def _eligible(bench: Bench) -> Case:
    rows, filters = _row_columns(bench), _filters()
    return Case(
        "eligible", bench.n, bench.n * (4 + 29 + 1),
        lambda: check_rows(rows, bench.slots, filters, 0, bench.book.exclude_bits, NOW_MS),
    )  # fmt: skip


def _groups(bench: Bench) -> Case:
    order = bench.rng.permutation(bench.n).astype(np.int32)
    eligible, category = bench.rng.random(bench.n) < ELIGIBLE_SHARE, bench.columns.category
    return Case(
        "groups",
        bench.n,
        bench.n * (4 + 4 + 4),
        lambda: first_of_groups(by_group(order, category, CATEGORIES), eligible, 20),
    )


def _lookup(bench: Bench) -> Case:
    c = bench.columns
    ids = IdMap(c.ids, c.id_lengths)
    for slot in range(bench.n):
        ids.insert(slot)
    asked = bench.rng.integers(0, bench.n, EVENTS)
    wanted, lengths = c.ids[asked], c.id_lengths[asked]
    length = int(c.id_lengths[0])
    return Case(
        "lookup", bench.n, EVENTS * (2 * (length + 1) + 4 + 4), lambda: ids.lookup(wanted, lengths), events=EVENTS
    )


def _distinct(bench: Bench) -> Case:
    registers = bench.columns.viewer_registers
    return Case("distinct", bench.n, registers.nbytes + 4 * bench.n, lambda: estimate_distinct(registers))


def _features(bench: Bench) -> Case:
    c = bench.columns
    read = c.counters.nbytes + c.viewer_registers.nbytes + c.chatter_registers.nbytes + 28 * bench.n
    return Case(
        "features", bench.n, read + 5 * bench.n * len(bench.features),
        lambda: bench.features.compute(c, bench.slots, NOW_MS, NOW_MS - 600_000),
    )  # fmt: skip


def _rules(bench: Bench) -> Case:
    found = bench.features.compute(bench.columns, bench.slots, NOW_MS, NOW_MS - 600_000)
    reported, before = np.ones(len(bench.features), np.bool_), np.zeros(bench.n, np.uint32)
    conditions = sum(len(rule.when) for rule in bench.book.rules.values())
    return Case(
        "rules", bench.n, bench.n * (4 * conditions + 8),
        lambda: assess(bench.book, bench.features.names, found.values, reported, before),
    )  # fmt: skip


def _fence(bench: Bench) -> Case:
    """Heartbeats that all renew: the event that changes most. Every run needs events not seen before."""
    slots = bench.rng.integers(0, bench.n, EVENTS).astype(np.int32)
    kinds = np.full(EVENTS, fence.HEARTBEAT, np.uint8)
    epochs, values = np.ones(EVENTS, np.int64), np.zeros(EVENTS, np.float64)
    producers, applied = np.zeros(EVENTS, np.int32), np.full(EVENTS, NOW_MS, np.int64)
    times = np.full(EVENTS, NOW_MS, np.int64)
    media, sequences = np.arange(EVENTS, dtype=np.int64), np.arange(EVENTS, dtype=np.uint64)
    highest, bits = np.zeros(1, np.uint64), np.zeros((1, WORDS), np.uint64)
    liveness = bench.columns.liveness()

    def prepare() -> None:
        for column in (media, sequences):
            column += column.dtype.type(EVENTS)
        for column in (times, applied):
            column += 1_000

    def run() -> None:
        fence.fence_events(
            liveness, slots, kinds, epochs, times, values, media, producers, sequences, applied, highest, bits,
            lease_ms=LEASE_MS, max_lateness_ms=600_000, max_future_ms=5_000,
        )  # fmt: skip

    # 57 bytes of event, 10 of outcome; state, epoch, lease and media sequence of the row, two of them written.
    return Case("fence", bench.n, EVENTS * (57 + 10 + 25 + 16), run, events=EVENTS, prepare=prepare)


def _scatter(bench: Bench) -> Case:
    slots = bench.rng.integers(0, bench.n, EVENTS).astype(np.int32)
    first = np.full(EVENTS, COUNTERS.index("viewers"), np.int8)
    second = np.full(EVENTS, COUNTERS.index("viewer_reports"), np.int8)
    weight, times = np.ones(EVENTS, np.float64), np.full(EVENTS, NOW_MS, np.int64)
    return Case(
        "scatter", bench.n, EVENTS * (30 + 2 * 24),
        lambda: scatter_decayed(
            bench.columns.counters, slots, first, weight, second, weight, times, NOW_MS - 600_000
        ),
        events=EVENTS,
    )  # fmt: skip


def _observe(bench: Bench) -> Case:
    slots = bench.rng.integers(0, bench.n, EVENTS).astype(np.int32)
    times, viewers = np.full(EVENTS, NOW_MS, np.int64), np.full(EVENTS, -1.0)
    hashes = bench.rng.integers(1, 2**63, EVENTS).astype(np.uint64)
    chat, c = np.ones(EVENTS, np.bool_), bench.columns
    return Case(
        "observe", bench.n, EVENTS * (29 + 2 * 8 + 2),
        lambda: observe(
            slots, times, viewers, hashes, chat, c.last_event_ms, c.viewers, c.viewers_ms,
            c.viewer_registers, c.chatter_registers,
        ),
        events=EVENTS,
    )  # fmt: skip
