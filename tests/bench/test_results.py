"""Rows on disk and in the terminal."""

from pathlib import Path
from typing import Any

import pytest

from bench.results import append_rows, newest_rows, read_rows, table


def row(**changes: Any) -> dict[str, Any]:
    measured = {"median_ms": 2.0, "p20_ms": 1.5, "p80_ms": 2.5, "host_ms": None, "peak_mib": 3.0, "bound_ms": 0.1}
    measured |= {"op": "loss", "shape": [3, 4], "dtype": "fp32", "contender": "ours", "error": 1e-7}
    return measured | {"ratio_to_ours": 1.0} | changes


def test_rows_are_appended_and_never_edited(tmp_path: Path) -> None:
    path = tmp_path / "device" / "loss.jsonl"
    assert read_rows(path) == []
    append_rows(path, [row(), row(contender="eager")])
    before = path.read_bytes()
    append_rows(path, [row(median_ms=1.0)])
    assert path.read_bytes().startswith(before)
    assert read_rows(path) == [row(), row(contender="eager"), row(median_ms=1.0)]


def test_a_row_that_json_cannot_hold_writes_nothing(tmp_path: Path) -> None:
    path = tmp_path / "loss.jsonl"
    with pytest.raises(ValueError, match="JSON"):
        append_rows(path, [row(), row(error=float("nan"))])
    assert not path.exists()


def test_newest_row_of_each_contender() -> None:
    rows = [row(median_ms=5.0), row(contender="eager"), row(shape=[1, 1]), row(median_ms=4.0)]
    assert newest_rows(rows) == [row(contender="eager"), row(shape=[1, 1]), row(median_ms=4.0)]


def test_table_says_why_a_row_has_no_time() -> None:
    bare = {"op": "loss", "shape": [3, 4], "dtype": "fp32", "contender": "ours"}
    text = table(
        [
            row(),
            bare | {"skipped": "too large"},
            bare | {"failed": "KeyError: x"},
            bare | {"correct": False, "error": 0.5, "allowed": 0.1},
        ]
    )
    assert "1.5..2.5" in text
    assert "skipped: too large" in text
    assert "FAILED: KeyError: x" in text
    assert "WRONG: error 0.5, allowed 0.1" in text
