"""Dataset files: equal rows give equal files, half a file is no file, and another file is refused."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from models import labels, schema
from models.schema import ROW_GROUP_ROWS, Kind, RowWriter, arrow_schema, iterate_rows, read_rows, schema_hash
from models.synthetic import make_synthetic
from server.errors import ConfigError
from tests.app import FEATURES


@pytest.mark.parametrize("kind", ["impressions", "streams"])
def test_a_made_up_file_has_the_documented_columns_and_says_what_it_is(kind: Kind, tmp_path: Path) -> None:
    path = tmp_path / "rows.parquet"
    make_synthetic(path, kind, ROW_GROUP_ROWS + 10, seed=3)
    table = read_rows(path)
    assert list(table.columns) == arrow_schema(kind, len(FEATURES), 16).names and len(table) == ROW_GROUP_ROWS + 10
    assert table.features.shape == (len(table), len(FEATURES)) and table.feature_names == FEATURES.names
    assert table.metadata["rows"] == kind and table.metadata["feature_schema"] == FEATURES.schema
    assert table.metadata["schema_hash"] == schema_hash(arrow_schema(kind, len(FEATURES), 16), FEATURES.schema, kind)
    groups = list(iterate_rows(path, ["features"]))
    assert [len(group) for group in groups] == [ROW_GROUP_ROWS, 10]
    assert np.array_equal(np.concatenate([group.features for group in groups]), table.features)
    documented = (Path(__file__).parents[2] / "docs" / "datasets.md").read_text()
    for name in table.columns:
        generic = [name.replace("_5m", "_{h}m").replace("_15m", "_{h}m")]
        generic += [f"{{viewers,engaged,value}}_{part}_{{h}}m" for part in ("gain", "growth") if part in name]
        assert any(f"`{one}`" in documented for one in generic), name


def test_equal_rows_give_equal_files_however_they_are_handed_over(tmp_path: Path) -> None:
    make_synthetic(tmp_path / "a.parquet", "impressions", 20_000, seed=1)
    rows = pq.read_table(tmp_path / "a.parquet")
    hashes = {read_rows(tmp_path / "a.parquet").metadata["data_hash"]}
    for size in (1_000, 7_777, ROW_GROUP_ROWS, 30_000):
        path = tmp_path / f"{size}.parquet"
        with RowWriter(path, "impressions", FEATURES, 16) as writer:
            for first in range(0, len(rows), size):
                writer.write(rows.slice(first, size))
        hashes.add(read_rows(path).metadata["data_hash"])
        assert writer.rows == 20_000 and pq.read_metadata(path).num_row_groups == 3
    assert len(hashes) == 1
    make_synthetic(tmp_path / "b.parquet", "impressions", 20_000, seed=2)
    assert read_rows(tmp_path / "b.parquet").metadata["data_hash"] not in hashes


@pytest.mark.parametrize("row", [0, 99])
@pytest.mark.parametrize("column", ["clicked", "watch_s", "features", "viewer_id", "position"])
def test_one_changed_value_changes_the_hash_of_the_data(column: str, row: int, tmp_path: Path) -> None:
    make_synthetic(tmp_path / "a.parquet", "impressions", 100, seed=1)
    rows = pq.read_table(tmp_path / "a.parquet")
    values = rows.column(column).to_pylist()
    last = values[row]
    values[row] = (
        [x + 1.0 for x in last] if isinstance(last, list) else f"{last}x" if isinstance(last, str)
        else not last if isinstance(last, bool) else last + 1
    )  # fmt: skip
    place = rows.column_names.index(column)
    changed = rows.set_column(place, rows.schema.field(place), pa.array(values, rows.schema.field(place).type))
    with RowWriter(tmp_path / "b.parquet", "impressions", FEATURES, 16) as writer:
        writer.write(changed)
    assert writer.data_hash != read_rows(tmp_path / "a.parquet").metadata["data_hash"]


def test_a_file_appears_complete_or_not_at_all(tmp_path: Path) -> None:
    path = tmp_path / "rows.parquet"
    make_synthetic(path, "streams", 50, seed=1)
    before = path.read_bytes()
    with pytest.raises(ValueError, match="field names"), RowWriter(path, "streams", FEATURES, 16) as writer:
        writer.write(pq.read_table(path).slice(0, 10).select([0]))
    assert path.read_bytes() == before and list(tmp_path.iterdir()) == [path]
    with (
        pytest.raises(ConfigError, match="cannot be written"),
        RowWriter(tmp_path / "no" / "x", "streams", FEATURES, 4),
    ):
        pass


def test_another_file_is_refused(tmp_path: Path) -> None:
    pq.write_table(pa.table({"at_ms": [1]}), tmp_path / "other.parquet")
    with pytest.raises(ConfigError, match="dataset of format 2 wanted, got another file"):
        read_rows(tmp_path / "other.parquet")
    (tmp_path / "text.parquet").write_text("hello")
    with pytest.raises(ConfigError, match="cannot be read as Parquet"):
        list(iterate_rows(tmp_path / "text.parquet"))


def test_the_schema_hash_depends_on_features_labels_and_columns(monkeypatch: pytest.MonkeyPatch) -> None:
    columns = arrow_schema("impressions", 3, 4)
    hashes = {schema_hash(columns, "a", "impressions"), schema_hash(columns, "b", "impressions")}
    hashes.add(schema_hash(arrow_schema("impressions", 3, 4, viewers=True), "a", "impressions"))
    hashes.add(schema_hash(columns, "a", "streams"))
    monkeypatch.setattr(labels, "WATCHED_S", 31.0)
    hashes.add(schema_hash(columns, "a", "impressions"))
    monkeypatch.setattr(schema, "FORMAT", "3")
    hashes.add(schema_hash(columns, "a", "impressions"))
    assert len(hashes) == 6
