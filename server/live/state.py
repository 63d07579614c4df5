"""What the log determines of a live table, taken out and put back: a restart need not replay everything.

`StateBuffer.capture` runs on the engine thread and only copies; the memory it copies into is made and touched
before, on another thread, because first use of memory costs many times the copy.
"""

from __future__ import annotations

import hashlib
import logging
from dataclasses import dataclass, field, fields
from typing import Any

import numpy as np
from numpy.typing import NDArray

from kernels import fence
from kernels.counters import COUNTERS, HALF_LIVES_MS
from kernels.dedup import WINDOW, WORDS
from kernels.idmap import ID_BYTES
from server.live.columns import SESSION, SKETCH_REGISTERS, Columns
from server.live.table import LiveTable

COLUMNS = tuple(column.name for column in fields(Columns))
INTERNERS = ("creators", "languages", "categories", "regions")
LAYOUT = hashlib.sha256(
    repr((COLUMNS, COUNTERS, HALF_LIVES_MS, SKETCH_REGISTERS, ID_BYTES, WINDOW)).encode()
).hexdigest()[:16]
"""Changes whenever state written by one version cannot be read by another."""


logger = logging.getLogger(__name__)
_TOLD = {False: ("nothing", "begins to remember them"), True: ("what it knew", "remembers none")}


@dataclass(frozen=True)
class TableState:
    """A live table at one moment, R used rows and P producers.

    columns: by name, [R, ...]; trailing dimensions may be flattened. titles, tags: R each. names: by interner, from
    number 0. producers: by row of their windows; producer_used_ms int64[P], highest uint64[P], window_bits
    uint64[P, WORDS].
    Free rows are those without an id. Arrays may be views of a `StateBuffer`, valid until its next capture.
    """

    columns: dict[str, NDArray[Any]]
    titles: list[str]
    tags: list[tuple[str, ...]]
    names: dict[str, list[str]]
    landmark_ms: int
    counters_seen: NDArray[np.bool_]
    producers: list[str]
    producer_used_ms: NDArray[np.int64]
    highest: NDArray[np.uint64]
    window_bits: NDArray[np.uint64]
    followed: dict[str, dict[str, NDArray[Any]]] = field(default_factory=dict)
    """What the table's follower keeps, by table and column; empty without one."""

    @property
    def rows(self) -> int:
        """R, the table's high-water mark."""
        return len(self.titles)

    @property
    def embedding_dim(self) -> int:
        """D, length of an embedding."""
        return int(self.columns["embedding"].shape[1])


def to_host(column: Any, out: NDArray[Any]) -> None:
    """Copies the first ``len(out)`` rows of a column into host memory. The only way out of a column."""
    if isinstance(column, np.ndarray):
        np.copyto(out, column[: len(out)])
    else:
        column[: len(out)].get(out=out)  # on a GPU; waits for it


def from_host(column: Any, rows: NDArray[Any]) -> None:
    """Writes host rows over the first ``len(rows)`` rows of a column. The only way in."""
    rows = rows.reshape((len(rows), *column.shape[1:]))
    if isinstance(column, np.ndarray):
        column[: len(rows)] = rows
    else:
        column[: len(rows)].set(np.ascontiguousarray(rows))


def column_of(table: LiveTable, name: str) -> Any:
    """A column of the table by its name in `Columns`, wherever it lives."""
    return table.accumulators.column(name) if name in SESSION else getattr(table.columns, name)


class StateBuffer:
    """Memory for one captured state, used again for the next."""

    def __init__(self) -> None:
        self._memory: dict[str, NDArray[Any]] = {}

    def reserve(self, table: LiveTable) -> None:
        """Makes and touches memory for the table as it is, and an eighth more. Any thread, not during a capture."""
        rows = min(table.rows + table.rows // 8 + 1024, table.settings.capacity)
        for name in COLUMNS:
            self._hold(name, getattr(table.columns, name), rows)
        producers = min(len(table._highest), table.settings.max_producers)
        self._hold("window_bits", table._window_bits, producers)
        for name, columns in _followed(table).items():
            for column, held in columns.items():
                self._hold(f"{name}.{column}", held, len(held) + len(held) // 8 + 1024)

    def _hold(self, name: str, like: Any, rows: int) -> None:
        held = self._memory.get(name)
        if held is None or len(held) < rows:
            self._memory[name] = np.empty((rows, *like.shape[1:]), like.dtype)
            self._memory[name].fill(0)

    def _taken(self, name: str, column: Any, rows: int) -> NDArray[Any]:
        self._hold(name, column, rows)
        out = self._memory[name][:rows]
        to_host(column, out)
        return out

    def capture(self, table: LiveTable) -> TableState:
        """Copies the table's state; on the thread that owns the table."""
        producers = sorted(table._producers, key=table._producers.__getitem__)
        return TableState(
            columns={name: self._taken(name, column_of(table, name), table.rows) for name in COLUMNS},
            titles=table.titles[: table.rows],
            tags=table.tags[: table.rows],
            names={name: list(getattr(table, name).names) for name in INTERNERS},
            landmark_ms=table.landmark_ms,
            counters_seen=table.counters_seen.copy(),
            producers=producers,
            producer_used_ms=np.array(table._producer_used_ms, np.int64),
            highest=table._highest[: len(producers)].copy(),
            window_bits=self._taken("window_bits", table._window_bits, len(producers)),
            followed={
                name: {column: self._taken(f"{name}.{column}", held, len(held)) for column, held in columns.items()}
                for name, columns in _followed(table).items()
            },
        )


def _followed(table: LiveTable) -> dict[str, dict[str, NDArray[Any]]]:
    return {} if table.follower is None else table.follower.columns()


def problem_of(state: TableState, rows: int, dim: int) -> str:
    """What a compiled loop would trip over in a state that was read from somewhere; "" if nothing.

    A column of another type or length than for ``rows`` and embeddings of ``dim``, an id twice, a number of no name.
    """
    if state.rows != rows or dim < 1:
        return f"{state.rows} rows of embeddings of {dim}, {rows} rows wanted"
    model = Columns.allocate(0, np.zeros((0, dim), np.float32))
    for name in COLUMNS:
        found, wanted = state.columns[name], getattr(model, name)
        width = int(np.prod(wanted.shape[1:], dtype=np.int64))
        if found.dtype != wanted.dtype or (len(found), int(np.prod(found.shape[1:]))) != (rows, width):
            return f"{name}: {wanted.dtype}[{rows} x {width}] wanted, got {found.dtype}{list(found.shape)}"
    for name, column in zip(INTERNERS, ("creator", "language", "category", "region"), strict=True):
        known, used = state.names[name], state.columns[column]
        if known[:1] != [""] or (rows and not 0 <= int(used.min()) <= int(used.max()) < len(known)):
            return f"{column}: a number that stands for no name"
    if None in state.titles or len(state.counters_seen) != len(COUNTERS):
        return f"a title is missing, or counters_seen is not of {len(COUNTERS)}"
    return _id_problem(state) or _producer_problem(state)


def _id_problem(state: TableState) -> str:
    """Of the columns that the id map and the list of free rows are made from."""
    ids, lengths = state.columns["ids"].reshape(-1, ID_BYTES), state.columns["id_lengths"]
    if state.rows and int(lengths.max()) > ID_BYTES:
        return f"id_lengths: at most {ID_BYTES} allowed"
    used, states = lengths > 0, state.columns["state"]
    if not np.array_equal(used, states != fence.FREE) or (states > fence.ENDED).any():
        return "state: a row with an id that is free, one without that is not, or no state at all"
    if ids[np.arange(ID_BYTES) >= lengths[:, None]].any():
        return "ids: bytes beyond their length"
    if len({row.tobytes() for row in ids[used]}) != np.count_nonzero(used):
        return "ids: one is there twice"
    return ""


def _producer_problem(state: TableState) -> str:
    producers = len(state.producers)
    for name, array, dtype, size in (
        ("producer_used_ms", state.producer_used_ms, np.int64, producers),
        ("highest", state.highest, np.uint64, producers),
        ("window_bits", state.window_bits, np.uint64, producers * WORDS),
    ):
        if array.dtype != dtype or array.size != size:
            return f"{name}: {size} of {np.dtype(dtype)} wanted, got {array.size} of {array.dtype}"
    if None in state.producers or len(set(state.producers)) != producers:
        return "a producer is missing, or there twice"
    return ""


def restore(table: LiveTable, state: TableState) -> None:
    """Puts a state into a table that nothing was applied to. The caller checked that it fits.

    A follower of a state without one begins empty, and the other way round what there is of it is dropped: logged.

    Raises:
        ValueError: the table was used before, is too small, or has another embedding_dim; the follower cannot take
        what is its own.
    """
    rows, dim = state.rows, table.settings.embedding_dim
    if table.rows or rows > table.settings.capacity or state.embedding_dim != dim:
        raise ValueError(f"state of {rows} rows x {state.embedding_dim} does not fit this table")
    if table.follower is not None and state.followed:
        table.follower.restore(state.followed)
    elif table.follower is not None or state.followed:
        logger.info("the snapshot has %s about viewers, this server %s", *_TOLD[bool(state.followed)])
    for name in COLUMNS:
        if name == "embedding":
            every = np.arange(rows, dtype=np.int32)
            table.write_embeddings(every, np.ascontiguousarray(state.columns[name]))
        else:
            from_host(column_of(table, name), state.columns[name])
    table.rows = rows
    table._next_change_ms = 0
    table.accumulators.liveness_changed(np.arange(rows, dtype=np.int32))
    table.accumulators.identity_changed(np.arange(rows, dtype=np.int32))
    table.titles[:rows], table.tags[:rows] = state.titles, state.tags
    for (column, interner), name in zip(table.interned(), INTERNERS, strict=True):
        interner.restore(state.names[name], column[:rows])
    table.landmark_ms = state.landmark_ms
    table.counters_seen[:] = state.counters_seen
    table._free = np.flatnonzero(state.columns["id_lengths"] == 0).tolist()  # ascending, hence a heap
    table.map.insert_all(rows)
    # Space for producers grows by doubling; any size from here on gives the same windows.
    table._producers = {name: row for row, name in enumerate(state.producers)}
    table._producer_used_ms = state.producer_used_ms.tolist()
    table._highest, table._window_bits = state.highest.copy(), state.window_bits.copy().reshape(-1, WORDS)
