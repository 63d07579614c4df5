"""Stream features: declared in features.toml, computed here and nowhere else.

Server, replay and trainer call `FeatureSet.compute`; its declaration's hash is the feature schema
that every exported model carries and that is checked when a model is loaded.
"""

from __future__ import annotations

import hashlib
import json
import math
import tomllib
from collections.abc import Callable
from dataclasses import dataclass
from enum import IntEnum
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from kernels.counters import COUNTERS, HALF_LIVES_MS, decay_factors, saturation
from kernels.programs import ATTRIBUTES, PER_MINUTE, Code, FeatureProgram, Number, Op
from kernels.sessions import estimate_distinct
from server.errors import ConfigError
from server.live.columns import Columns

Values = NDArray[np.float32]
Mask = NDArray[np.bool_]


class State(IntEnum):
    """State of a feature value (numbers of the proto's FeatureValue.State)."""

    PRESENT = 0
    MISSING = 1
    STALE = 2


@dataclass(frozen=True)
class Features:
    """values float32[n, F] (finite), states uint8[n, F]; row i belongs to the i-th row asked for."""

    values: Values
    states: NDArray[np.uint8]


class _Reading:
    """The rows' columns as of one moment, read at most once each."""

    def __init__(self, columns: Columns, slots: NDArray[np.int32], now_ms: int, landmark_ms: int) -> None:
        self.columns, self.slots, self.now_ms = columns, slots, now_ms
        self._factors = decay_factors(now_ms, landmark_ms)
        self._saturation = saturation(now_ms - columns.started_ms[slots])
        self._sums: dict[tuple[str, int], Values] = {}

    def sum(self, counter: str, half_life_s: int) -> Values:
        """Decayed sum float32[n] of a counter."""
        key = (counter, half_life_s)
        if key not in self._sums:
            h = HALF_LIVES_MS.index(half_life_s * 1000)
            stored = self.columns.counters[self.slots, COUNTERS.index(counter), h]
            self._sums[key] = stored * self._factors[h]
        return self._sums[key]

    def level(self, name: str, half_life_s: int) -> tuple[Values, Mask]:
        """Mean of a gauge, or per-minute rate of a counter, with the mask of rows that have one."""
        if name == "viewers":
            reports = self.sum("viewer_reports", half_life_s)
            seen = reports > 1e-6
            mean = self.sum("viewers", half_life_s) / np.maximum(reports, np.float32(1e-6))
            return mean.astype(np.float32, copy=False), seen
        # A constant rate r gives a decayed sum of r * h / ln 2, times how full the window is yet.
        h = HALF_LIVES_MS.index(half_life_s * 1000)
        total = self.sum(name, half_life_s)
        return total * np.float32(PER_MINUTE[h]) / self._saturation[h], total > 0


Compute = Callable[[_Reading, "dict[str, Any]"], "tuple[Values, Mask, Mask | None]"]


def _age(r: _Reading, d: dict[str, Any]) -> tuple[Values, Mask, Mask | None]:
    minutes = (r.now_ms - r.columns.started_ms[r.slots]) / np.float64(60_000)
    return np.maximum(minutes, 0).astype(np.float32), np.ones(len(r.slots), bool), None


def _staleness(r: _Reading, d: dict[str, Any]) -> tuple[Values, Mask, Mask | None]:
    last = r.columns.last_event_ms[r.slots]
    return np.maximum((r.now_ms - last) / np.float64(1000), 0).astype(np.float32), last > 0, None


def _gauge(r: _Reading, d: dict[str, Any]) -> tuple[Values, Mask, Mask | None]:
    at = r.columns.viewers_ms[r.slots]
    return r.columns.viewers[r.slots], at > 0, r.now_ms - at > d["stale_after_s"] * 1000


def _mean_or_rate(r: _Reading, d: dict[str, Any]) -> tuple[Values, Mask, Mask | None]:
    return *r.level(d["of"], d["half_life_s"]), None


def _velocity(r: _Reading, d: dict[str, Any]) -> tuple[Values, Mask, Mask | None]:
    fast, seen = r.level(d["of"], d["fast_s"])
    slow, _ = r.level(d["of"], d["slow_s"])
    return (fast + 1) / (slow + 1), seen, None


def _acceleration(r: _Reading, d: dict[str, Any]) -> tuple[Values, Mask, Mask | None]:
    fast, seen = r.level(d["of"], d["fast_s"])
    mid, _ = r.level(d["of"], d["mid_s"])
    slow, _ = r.level(d["of"], d["slow_s"])
    return ((fast + 1) / (mid + 1)) / ((mid + 1) / (slow + 1)), seen, None


def _difference(r: _Reading, d: dict[str, Any]) -> tuple[Values, Mask, Mask | None]:
    fast, seen = r.level(d["of"], d["fast_s"])
    slow, _ = r.level(d["of"], d["slow_s"])
    return fast - slow, seen, None


def _ratio(r: _Reading, d: dict[str, Any]) -> tuple[Values, Mask, Mask | None]:
    per = r.sum(d["per"], d["half_life_s"])
    return r.sum(d["of"], d["half_life_s"]) / (per + np.float32(d["prior"])), per > 0, None


def _per_viewer(r: _Reading, d: dict[str, Any]) -> tuple[Values, Mask, Mask | None]:
    rate, _ = r.level(d["of"], d["half_life_s"])
    viewers, seen = r.level("viewers", d["half_life_s"])
    return rate / (viewers + np.float32(d["prior"])), seen, None


def _unique(r: _Reading, d: dict[str, Any]) -> tuple[Values, Mask, Mask | None]:
    registers = r.columns.viewer_registers if d["of"] == "viewers" else r.columns.chatter_registers
    estimate = estimate_distinct(registers[r.slots])
    return estimate, estimate > 0, None


def _attribute(r: _Reading, d: dict[str, Any]) -> tuple[Values, Mask, Mask | None]:
    value = getattr(r.columns, d["of"])[r.slots].astype(np.float32)
    return value, np.ones(len(r.slots), bool), None


_COUNTED = tuple(c for c in COUNTERS if c != "viewer_reports")
_SKETCHES = ("viewers", "chatters")
_SECONDS = tuple(h // 1000 for h in HALF_LIVES_MS)
# kind → (function, {field: allowed values, or a type})
_KINDS: dict[str, tuple[Compute, dict[str, Any]]] = {
    "age": (_age, {}),
    "staleness": (_staleness, {}),
    "gauge": (_gauge, {"of": ("viewers",), "stale_after_s": float}),
    "mean": (_mean_or_rate, {"of": ("viewers",), "half_life_s": _SECONDS}),
    "rate": (_mean_or_rate, {"of": _COUNTED[1:], "half_life_s": _SECONDS}),
    "velocity": (_velocity, {"of": _COUNTED, "fast_s": _SECONDS, "slow_s": _SECONDS}),
    "acceleration": (
        _acceleration,
        {"of": _COUNTED, "fast_s": _SECONDS, "mid_s": _SECONDS, "slow_s": _SECONDS},
    ),
    "difference": (_difference, {"of": _COUNTED, "fast_s": _SECONDS, "slow_s": _SECONDS}),
    "ratio": (_ratio, {"of": _COUNTED, "per": _COUNTED, "half_life_s": _SECONDS, "prior": float}),
    "per_viewer": (_per_viewer, {"of": _COUNTED[1:], "half_life_s": _SECONDS, "prior": float}),
    "unique": (_unique, {"of": _SKETCHES}),
    "attribute": (_attribute, {"of": ATTRIBUTES}),
}
# The same kinds for the GPU's kernel (kernels/features_gpu.py).
_OPS: dict[str, Op] = {
    "age": Op.AGE,
    "staleness": Op.STALENESS,
    "gauge": Op.GAUGE,
    "mean": Op.LEVEL,
    "rate": Op.LEVEL,
    "velocity": Op.VELOCITY,
    "acceleration": Op.ACCELERATION,
    "difference": Op.DIFFERENCE,
    "ratio": Op.RATIO,
    "per_viewer": Op.PER_VIEWER,
    "unique": Op.UNIQUE,
    "attribute": Op.ATTRIBUTE,
}


class FeatureSet:
    """A checked declaration and how to compute it.

    names: F feature names in column order. schema: 16 hex digits identifying the declaration.
    """

    def __init__(self, declarations: list[dict[str, Any]], where: str = "features") -> None:
        self._declarations = declarations
        for i, declaration in enumerate(declarations):
            _check(declaration, f"{where}: feature[{i}]")
        self.names = tuple(d["name"] for d in declarations)
        if len(set(self.names)) != len(self.names):
            raise ConfigError(f"{where}: feature names must be unique")
        canonical = json.dumps(declarations, sort_keys=True, separators=(",", ":"))
        self.schema = hashlib.sha256(canonical.encode()).hexdigest()[:16]

    @classmethod
    def load(cls, path: Path) -> FeatureSet:
        """Reads a declaration file. Raises ConfigError naming the feature and field at fault."""
        try:
            content = tomllib.loads(path.read_text())
        except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
            raise ConfigError(f"{path}: {error}") from error
        declarations = content.get("feature")
        if (
            set(content) != {"feature"}
            or not isinstance(declarations, list)
            or not all(isinstance(declaration, dict) for declaration in declarations)
        ):
            raise ConfigError(f"{path}: only [[feature]] tables are allowed, found {sorted(content)}")
        return cls(declarations, str(path))

    def __len__(self) -> int:
        return len(self.names)

    def reported(self, counters_seen: NDArray[np.bool_]) -> NDArray[np.bool_]:
        """bool[F]: whether the producers report what a feature is made of at all.

        ``counters_seen`` bool[N_COUNTERS] is the table's. A stream without likes tells something only on a
        platform that sends likes; rules must not take silence for evidence.
        """
        seen = {name for name, is_seen in zip(COUNTERS, counters_seen, strict=True) if is_seen}
        made_of = ([d[key] for key in ("of", "per") if d.get(key) in COUNTERS] for d in self._declarations)
        return np.array([seen.issuperset(names) for names in made_of], np.bool_)

    def program(self) -> FeatureProgram:
        """The declaration as the tables that the GPU's kernel evaluates, to the same values and states."""
        codes = np.zeros((len(self), len(Code)), np.int64)
        numbers = np.zeros((len(self), len(Number)), np.float32)
        for f, d in enumerate(self._declarations):
            op = _OPS[d["kind"]]
            codes[f, Code.OP] = op
            if op == Op.UNIQUE:
                codes[f, Code.OF] = _SKETCHES.index(d["of"])
            elif op == Op.ATTRIBUTE:
                codes[f, Code.OF] = ATTRIBUTES.index(d["of"])
            elif op == Op.GAUGE:
                # Ages are whole milliseconds: one is beyond a limit exactly when it is beyond the limit's floor.
                longest_ms = float(np.iinfo(np.int64).max // 2)
                codes[f, Code.STALE_AFTER_MS] = math.floor(min(max(d["stale_after_s"] * 1000, -longest_ms), longest_ms))
            elif "of" in d:
                codes[f, Code.OF] = COUNTERS.index(d["of"])
            if "per" in d:
                codes[f, Code.PER] = COUNTERS.index(d["per"])
            for key, code in (
                ("half_life_s", Code.FAST),
                ("fast_s", Code.FAST),
                ("mid_s", Code.MID),
                ("slow_s", Code.SLOW),
            ):
                if key in d:
                    codes[f, code] = HALF_LIVES_MS.index(d[key] * 1000)
            numbers[f, Number.MISSING] = d["missing"]
            numbers[f, Number.PRIOR] = d.get("prior", 0.0)
        return FeatureProgram(codes, numbers)

    def compute(self, columns: Columns, slots: NDArray[np.int32], now_ms: int, landmark_ms: int) -> Features:
        """Features of rows ``slots`` int32[n] as of ``now_ms``.

        Missing values take the declared stand-in, so values are always finite; stale ones keep
        their last value. A row's features do not depend on which other rows are asked for.
        """
        reading = _Reading(columns, slots, now_ms, landmark_ms)
        values = np.empty((len(slots), len(self)), np.float32)
        states = np.empty((len(slots), len(self)), np.uint8)
        for f, declaration in enumerate(self._declarations):
            value, present, stale = _KINDS[declaration["kind"]][0](reading, declaration)
            present = present & np.isfinite(value)
            values[:, f] = np.where(present, value, np.float32(declaration["missing"]))
            states[:, f] = np.where(present, State.PRESENT, State.MISSING)
            if stale is not None:
                states[present & stale, f] = State.STALE
        return Features(values, states)


def _check(declaration: dict[str, Any], where: str) -> None:
    name, kind = declaration.get("name"), declaration.get("kind")
    if not isinstance(name, str) or not name:
        raise ConfigError(f"{where}.name: a non-empty string wanted, got {name!r}")
    if kind not in _KINDS:
        raise ConfigError(f"{where} ({name}).kind: one of {', '.join(_KINDS)} wanted, got {kind!r}")
    wanted = {**_KINDS[kind][1], "missing": float}
    if extra := set(declaration) - set(wanted) - {"name", "kind"}:
        raise ConfigError(f"{where} ({name}): unknown {sorted(extra)}; {kind} takes {sorted(wanted)}")
    for key, allowed in wanted.items():
        value = declaration.get(key)
        if allowed is float:
            if not isinstance(value, int | float) or not math.isfinite(value):
                raise ConfigError(f"{where} ({name}).{key}: a finite number wanted, got {value!r}")
        elif value not in allowed:
            raise ConfigError(f"{where} ({name}).{key}: one of {list(allowed)} wanted, got {value!r}")
