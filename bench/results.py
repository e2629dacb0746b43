"""Rows on disk: one JSON object a line, appended, never edited."""

import json
import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from bench.machine import slug_of

Row = dict[str, Any]

RESULTS = Path(__file__).resolve().parent / "results"
IDENTITY = ("op", "shape", "dtype", "device", "threads", "torch", "triton", "python", "code")


def append_rows(path: Path, rows: Iterable[Row]) -> None:
    """Append all rows in one write, so that a reader or an interruption never leaves a part of a line."""
    text = "".join(json.dumps(row, allow_nan=False) + "\n" for row in rows)
    path.parent.mkdir(parents=True, exist_ok=True)
    handle = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    try:
        os.write(handle, text.encode())
    finally:
        os.close(handle)


def read_rows(path: Path) -> list[Row]:
    """Every row of the file, oldest first; none if there is no file."""
    if not path.exists():
        return []
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def collect(rows: Iterable[Row], results: Path) -> dict[str, list[Row]]:
    """Append rows to the files of their devices and grids, those that are not there yet; returns these by file."""
    files: dict[Path, list[Row]] = {}
    for row in rows:
        files.setdefault(results / slug_of(row["device"]) / f"{row['op']}.jsonl", []).append(row)
    new = {}
    for path, found in files.items():
        known = read_rows(path)
        if missing := [row for row in found if row not in known]:
            append_rows(path, missing)
            new[f"{path.parent.name}/{path.name}"] = missing
    return new


def identity(row: Row) -> str:
    """What makes another measurement of a row unnecessary: same case, device, versions and sources."""
    return json.dumps([row[name] for name in IDENTITY])


def newest_rows(rows: Iterable[Row]) -> list[Row]:
    """The last row of each shape, dtype and contender."""
    found: dict[str, Row] = {}
    for row in rows:
        key = json.dumps([row["op"], row["shape"], row["dtype"], row["contender"]])
        found.pop(key, None)
        found[key] = row
    return list(found.values())


def table(rows: Sequence[Row]) -> str:
    """The rows as plain text."""
    lines = [("op", "shape", "dtype", "contender", "ms", "p20..p80", "host ms", "x ours", "MiB", "bound ms", "error")]
    for row in rows:
        name = (row["op"], "x".join(map(str, row["shape"])), row["dtype"], row["contender"])
        if "median_ms" in row:
            spread = f"{row['p20_ms']:.4g}..{row['p80_ms']:.4g}"
            host = "" if row["host_ms"] is None else f"{row['host_ms']:.3g}"
            ratio, peak = f"{row['ratio_to_ours']:.2f}", f"{row['peak_mib']:.1f}"
            error = f"{row['error']:.1e}"
            lines.append((*name, f"{row['median_ms']:.4g}", spread, host, ratio, peak, f"{row['bound_ms']:.3g}", error))
        else:
            lines.append((*name, outcome(row), "", "", "", "", "", ""))
    return _aligned(lines)


def _aligned(lines: Sequence[tuple[str, ...]]) -> str:
    """Columns as wide as their widest cell, but for those that are a sentence."""
    widths = [max(len(line[column]) for line in lines if len(line[column]) < 50) for column in range(len(lines[0]))]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip() for line in lines
    )


def summary(rows: Sequence[Row]) -> str:
    """A line for each case as plain text: ours against its bound, and how many times as long each other one takes."""
    cases: dict[str, list[Row]] = {}
    for row in rows:
        cases.setdefault(json.dumps([row["op"], row["shape"], row["dtype"]]), []).append(row)
    lines = [("case", "", "ours ms", "host ms", "of bound", "times ours")]
    for found in cases.values():
        ours = next((row for row in found if row["contender"] == "ours"), found[0])
        name = (f"{ours['op']} {'x'.join(map(str, ours['shape']))}", ours["dtype"])
        if "median_ms" not in ours:
            lines.append((*name, "", "", "", outcome(ours)))
            continue
        host = "" if ours["host_ms"] is None else f"{ours['host_ms']:.3g}"
        others = (
            f"{row['contender']} {row['ratio_to_ours']:.2f}{'' if row['timing'] == ours['timing'] else '*'}"
            if "median_ms" in row
            else f"{row['contender']} {outcome(row).split(':')[0].lower()}"
            for row in found
            if row is not ours
        )
        bound = f"{ours['bound_ms'] / ours['median_ms']:.0%}"
        lines.append((*name, f"{ours['median_ms']:.4g}", host, bound, "  ".join(others)))
    return _aligned(lines)


def outcome(row: Row) -> str:
    """Why a row has no time."""
    if "skipped" in row:
        return f"skipped: {row['skipped']}"
    if "failed" in row:
        return f"FAILED: {row['failed']}"
    if row["correct"]:
        return "not timed: another contender failed"
    return f"WRONG: error {row['error']}, allowed {row['allowed']}"
