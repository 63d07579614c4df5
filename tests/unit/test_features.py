"""Features: declared once, finite, with their state, independent of which rows are asked together."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from server.config import TableSettings
from server.errors import ConfigError
from server.live.features import FeatureSet, State
from server.live.table import LiveTable
from tests.events import T0, apply, event, new_table, small_settings, started

FEATURES = FeatureSet.load(TableSettings().features_file)
MINUTE = 60_000


def row(table: LiveTable, now_ms: int, slot: int = 0) -> tuple[dict[str, float], dict[str, State]]:
    found = FEATURES.compute(table.columns, np.array([slot], np.int32), now_ms, table.landmark_ms)
    values = dict(zip(FEATURES.names, found.values[0].tolist(), strict=True))
    return values, dict(zip(FEATURES.names, (State(s) for s in found.states[0]), strict=True))


def busy_table() -> LiveTable:
    """One stream that gains a viewer and a like every second for ten minutes."""
    table = new_table(small_settings(lease_ms=3_600_000))
    apply(table, started("s", 1), at_ms=T0)
    for second in range(600):
        at = T0 + second * 1_000
        n = 2 + 4 * second
        apply(
            table,
            event("s", n, at, viewer_count={"count": second}),
            event("s", n + 1, at, viewer=f"v{second}", joined={}),
            event("s", n + 2, at, liked={}),
            event("s", n + 3, at, purchased={"amount_minor": 200, "currency": "USD"}),
            at_ms=at,
        )
    return table


def test_rates_means_velocities_and_uniques_are_what_they_say() -> None:
    values, states = row(busy_table(), T0 + 10 * MINUTE)
    assert values["age_minutes"] == 10.0 and values["staleness_s"] == 1.0 and values["viewers"] == 599.0
    assert values["joins_per_minute_1m"] == pytest.approx(60, rel=0.02), "a steady 1/s, after ten half-lives"
    assert values["joins_per_minute_5m"] == pytest.approx(60, rel=0.02), "though its window is only 3/4 full"
    assert values["joins_velocity"] == pytest.approx(1, rel=0.02), "steady is not accelerating"
    assert values["purchase_value_per_minute_5m"] == pytest.approx(2 * values["purchases_per_minute_5m"], rel=1e-5)
    assert 590 > values["viewers_mean_1m"] > values["viewers_mean_5m"] > values["viewers_mean_30m"] > 0
    assert values["viewers_velocity"] > 1 and values["viewers_gain_5m"] > 0
    assert values["unique_viewers"] == pytest.approx(600, rel=0.35)
    assert states["viewers"] == State.PRESENT and states["chats_per_minute_1m"] == State.MISSING


def test_a_gauge_goes_stale_and_says_so_but_keeps_its_value() -> None:
    values, states = row(busy_table(), T0 + 10 * MINUTE + 200_000)
    assert states["viewers"] == State.STALE and values["viewers"] == 599.0


def test_a_new_stream_has_missing_values_with_their_stand_ins() -> None:
    table = new_table(small_settings())
    apply(table, started("s", 1))
    values, states = row(table, T0)
    assert states["viewers_velocity"] == State.MISSING and values["viewers_velocity"] == 1.0
    assert states["age_minutes"] == State.PRESENT and values["age_minutes"] == 0.0


def test_values_are_finite_after_hours_of_silence_and_with_extreme_counts() -> None:
    table = new_table(small_settings())
    apply(
        table, started("s", 1), event("s", 2, viewer_count={"count": 1_000_000_000}),
        event("s", 3, chatted={"count": 1_000_000_000}),
        event("s", 4, bid={"amount_minor": 10**12, "currency": "USD"}),
    )  # fmt: skip
    for later in (0, MINUTE, 60 * MINUTE, 48 * 60 * MINUTE):
        found = FEATURES.compute(table.columns, np.zeros(1, np.int32), T0 + later, table.landmark_ms)
        assert np.isfinite(found.values).all()


def test_a_row_does_not_depend_on_the_rows_computed_with_it() -> None:
    table = new_table(small_settings())
    apply(table, *(started(f"s{i}", i + 1) for i in range(37)))
    apply(table, *(event(f"s{i}", 100 + i, viewer_count={"count": i * i}) for i in range(37)))
    together = FEATURES.compute(table.columns, np.arange(37, dtype=np.int32), T0 + 777, table.landmark_ms)
    for i in range(37):
        alone = FEATURES.compute(table.columns, np.array([i], np.int32), T0 + 777, table.landmark_ms)
        assert alone.values.tobytes() == together.values[i : i + 1].tobytes()


def declare(**field: Any) -> list[dict[str, Any]]:
    return [{"name": "f", "kind": "rate", "of": "liked", "half_life_s": 60, "missing": 0.0, **field}]


def test_any_change_of_a_declaration_changes_the_schema() -> None:
    base = FeatureSet(declare()).schema
    others = [declare(half_life_s=300), declare(missing=1.0), declare(name="g"), declare(of="shared")]
    assert len({base, *(FeatureSet(other).schema for other in others)}) == 5


@pytest.mark.parametrize(
    ("declarations", "told"),
    [
        (declare(kind="rat"), "kind: one of"),
        (declare(half_life_s=61), "half_life_s: one of [60, 300, 1800]"),
        (declare(of="nothing"), "of: one of"),
        (declare(missing="x"), "missing: a finite number"),
        (declare(extra=1), "unknown ['extra']"),
        (declare(name=""), "name: a non-empty string"),
        (declare() + declare(), "unique"),
    ],
)
def test_a_wrong_declaration_is_refused_naming_field_and_choices(declarations: list[dict[str, Any]], told: str) -> None:
    with pytest.raises(ConfigError) as refused:
        FeatureSet(declarations)
    assert told in str(refused.value)


@pytest.mark.parametrize("content", [b"[other]\n", b"feature = [1]\n", b"feature = 3\n"])
def test_a_file_with_anything_else_is_refused(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "features.toml"
    path.write_bytes(content)
    with pytest.raises(ConfigError, match=r"only \[\[feature\]\] tables"):
        FeatureSet.load(path)


def test_a_file_that_is_no_text_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "features.toml"
    path.write_bytes(b"\xff\xfe")
    with pytest.raises(ConfigError, match="utf-8"):
        FeatureSet.load(path)
