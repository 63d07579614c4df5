"""The rules file, checked: which conditions exclude or boost a stream, and how surfaces blend."""

from __future__ import annotations

import hashlib
import tomllib
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from kernels.programs import N_BUILT_IN, RuleProgram
from server.errors import ConfigError

BUILT_IN = ("ended", "stale", "blocked", "spam_marked", "unassessed")
"""Bits 0.. of the rule bits; set from the table, not from the file. All exclude."""
assert len(BUILT_IN) == N_BUILT_IN  # what the GPU's kernel leaves room for
PER_REQUEST = ("region", "age_rating", "language", "category", "excluded", "seen")
"""Rules that depend on who asks; they have no bit."""
MAX_RULES = 32 - len(BUILT_IN)

Model = TypeVar("Model", bound=BaseModel)


class Condition(BaseModel):
    """``feature`` beyond ``above`` (or ``below``) enters; back across ``until`` leaves."""

    model_config = ConfigDict(frozen=True, extra="forbid")
    feature: str
    above: float | None = None
    below: float | None = None
    until: float


class Rule(BaseModel):
    """A named rule of the file."""

    model_config = ConfigDict(frozen=True, extra="forbid")
    when: tuple[Condition, ...] = Field(min_length=1)
    exclude: bool = False
    boost: float = Field(0.0, ge=-10.0, le=10.0)


class Surface(BaseModel):
    """Blend weights and slate policy of one surface; see default.toml."""

    model_config = ConfigDict(frozen=True, extra="forbid")
    trend_weight: float = Field(1.0, ge=0.0, le=100.0)
    similarity_weight: float = Field(0.5, ge=0.0, le=100.0)
    followed_bonus: float = Field(0.3, ge=0.0, le=100.0)
    fresh_bonus: float = Field(0.1, ge=0.0, le=100.0)
    cold_start_trend: float = Field(0.2, ge=0.0, le=1.0)
    boost_weight: float = Field(1.0, ge=0.0, le=100.0)
    click_weight: float = Field(0.5, ge=0.0, le=100.0)
    watch_weight: float = Field(1.0, ge=0.0, le=100.0)
    purchase_weight: float = Field(2.0, ge=0.0, le=100.0)
    report_weight: float = Field(5.0, ge=0.0, le=100.0)
    diversity: float = Field(0.15, ge=0.0, le=100.0)
    creator_cap: int = Field(2, ge=0)
    category_share: float = Field(0.5, gt=0.0, le=1.0)
    exploration_share: float = Field(0.08, ge=0.0, le=0.5)
    max_age_rating: int = Field(18, ge=0, le=21)

    @property
    def head_weights(self) -> tuple[float, float, float, float]:
        """What a probability of each of the ranker's heads adds to the utility: click, watch, purchase, report."""
        return self.click_weight, self.watch_weight, self.purchase_weight, -self.report_weight


SURFACE_FIELDS = tuple(Surface.model_fields)


@dataclass(frozen=True)
class RuleBook:
    """Checked content of a rules file. hash: 16 hex digits of its bytes."""

    rules: dict[str, Rule]
    surfaces: dict[str, Surface]
    hash: str

    @cached_property
    def surface_places(self) -> dict[str, int]:
        """Name of a surface → its column of `surface_values`."""
        return {name: place for place, name in enumerate(self.surfaces)}

    @cached_property
    def surface_values(self) -> NDArray[np.float64]:
        """float64[fields, surfaces]: what surfaces say, a row per `SURFACE_FIELDS`."""
        values = [[getattr(surface, name) for surface in self.surfaces.values()] for name in SURFACE_FIELDS]
        return np.array(values, np.float64)

    @cached_property
    def kept_columns(self) -> dict[tuple[int, int], Any]:
        """For whoever makes columns of a surface's values: what was made, by place of the surface and length."""
        return {}

    @property
    def names(self) -> tuple[str, ...]:
        """Rule names by bit: built-in ones first."""
        return (*BUILT_IN, *self.rules)

    @property
    def exclude_bits(self) -> int:
        """Bits that keep a stream out of every slate."""
        bits = (1 << len(BUILT_IN)) - 1
        for i, rule in enumerate(self.rules.values()):
            bits |= int(rule.exclude) << (len(BUILT_IN) + i)
        return bits

    def program(self, feature_names: tuple[str, ...]) -> RuleProgram:
        """The rules as the tables that the GPU's kernel evaluates; columns of features as in ``feature_names``."""
        conditions = [condition for rule in self.rules.values() for condition in rule.when]
        threshold = [c.above if c.above is not None else c.below for c in conditions]
        return RuleProgram(
            starts=np.cumsum([0, *(len(rule.when) for rule in self.rules.values())], dtype=np.int32),
            features=np.array([feature_names.index(c.feature) for c in conditions], np.int32),
            above=np.array([c.above is not None for c in conditions], np.uint8),
            enters=np.array(threshold, np.float32),
            leaves=np.array([c.until for c in conditions], np.float32),
            boosts=np.array([rule.boost for rule in self.rules.values()], np.float32),
        )

    @classmethod
    def load(cls, path: Path, feature_names: tuple[str, ...]) -> RuleBook:
        """Reads and checks a rules file.

        Raises:
            ConfigError: names the rule or surface, the key, and what is allowed.
        """
        try:
            content = path.read_bytes()
            values = tomllib.loads(content.decode())
        except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
            raise ConfigError(f"{path}: {error}") from error
        if extra := set(values) - {"rule", "surface"}:
            raise ConfigError(f"{path}: unknown {sorted(extra)}; only [rule.NAME] and [surface.NAME] are allowed")
        for section in ("rule", "surface"):
            tables = values.get(section, {})
            if not isinstance(tables, dict) or not all(isinstance(t, dict) for t in tables.values()):
                raise ConfigError(f"{path}: {section}: [{section}.NAME] tables wanted")
        rules = {name: _parse(Rule, table, f"{path}: rule.{name}") for name, table in values.get("rule", {}).items()}
        for name, rule in rules.items():
            _check_rule(name, rule, feature_names, str(path))
        if len(rules) > MAX_RULES:
            raise ConfigError(f"{path}: at most {MAX_RULES} rules allowed, found {len(rules)}")
        surfaces = values.get("surface", {})
        if "default" not in surfaces:
            raise ConfigError(f"{path}: surface.default is missing")
        parsed = {
            name: _parse(Surface, {**surfaces["default"], **table}, f"{path}: surface.{name}")
            for name, table in surfaces.items()
        }
        return cls(rules, parsed, hashlib.sha256(content).hexdigest()[:16])


def _parse(model: type[Model], table: dict[str, object], where: str) -> Model:
    try:
        return model(**table)
    except ValidationError as error:
        faults = "; ".join(f"{'.'.join(map(str, f['loc']))}: {f['msg']}" for f in error.errors())
        raise ConfigError(f"{where}: {faults}") from error


def _check_rule(name: str, rule: Rule, feature_names: tuple[str, ...], where: str) -> None:
    if name in BUILT_IN or name in PER_REQUEST:
        raise ConfigError(f"{where}: rule.{name}: this name is built in")
    for i, condition in enumerate(rule.when):
        at = f"{where}: rule.{name}.when[{i}]"
        if condition.feature not in feature_names:
            raise ConfigError(f"{at}.feature: {condition.feature!r} is not declared in the feature file")
        if (condition.above is None) == (condition.below is None):
            raise ConfigError(f"{at}: exactly one of above and below wanted")
        if condition.above is not None and condition.until > condition.above:
            raise ConfigError(f"{at}.until: at most above ({condition.above}) allowed, got {condition.until}")
        if condition.below is not None and condition.until < condition.below:
            raise ConfigError(f"{at}.until: at least below ({condition.below}) allowed, got {condition.until}")
