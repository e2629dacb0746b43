"""Labelled text in a user's CSV, TSV, JSONL or Parquet file."""

from __future__ import annotations

import json
import math
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sdprune.data.examples import Examples
from sdprune.recipe import DataConfig

Columns = Mapping[str, Sequence[Any]]


@dataclass(frozen=True)
class Table:
    """What a file holds: a label is a string, a whole number or another finite number.

    Args:
        path: the file.
        texts: one or two texts a row.
        labels: label of every row.
        groups: group of every row, or None.
    """

    path: Path
    texts: tuple[tuple[str, ...], ...]
    labels: tuple[str | int | float, ...]
    groups: tuple[str, ...] | None

    def class_names(self) -> tuple[str, ...]:
        """Return the sorted names of the classes; none if the labels are numbers that are not all whole.

        Raises:
            ValueError: all labels are equal.
        """
        distinct = set(self.labels)
        if len(distinct) == 1:
            raise ValueError(f"{self.path} holds a single class, {str(self.labels[0])!r}; two are needed")
        if any(isinstance(label, str) for label in distinct):
            return tuple(sorted(map(str, distinct)))
        if any(isinstance(label, float) for label in distinct):
            return ()
        return tuple(map(str, sorted(distinct)))

    def examples(self, class_names: Sequence[str]) -> Examples:
        """Return the rows with labels as indices into `class_names`, or as numbers if that is empty.

        Raises:
            ValueError: a label is no class, or no number; the message names the row.
        """
        index = {name: place for place, name in enumerate(class_names)}
        for row, label in enumerate(self.labels, start=1):
            if class_names and str(label) not in index:
                raise ValueError(
                    f"{self.path} row {row}: the training rows never have the label {str(label)!r}, "
                    f"only {', '.join(map(repr, class_names))}"
                )
            if not class_names and isinstance(label, str):
                raise ValueError(
                    f"{self.path} row {row}: the label {label!r} is no number, but the training labels are"
                )
        if class_names:
            return Examples(self.texts, tuple(index[str(label)] for label in self.labels))
        return Examples(self.texts, tuple(map(float, self.labels)))


def read_table(path: Path, config: DataConfig, *, grouped: bool) -> Table:
    """Read the columns that `config` names; rows in messages are counted from 1 after any header.

    Args:
        path: the file; its extension tells the format.
        config: names of the columns.
        grouped: read the group column too, if one is named.

    Raises:
        ValueError: there is no such file, it cannot be read, it has no rows, a column is missing, or a row has no
            text, label or group.
    """
    if not path.is_file():
        raise ValueError(f"no such file: {path}")
    if path.suffix.lower() not in FORMATS:
        raise ValueError(f"{path} has an unknown extension; known are {', '.join(FORMATS)}")
    try:
        columns = FORMATS[path.suffix.lower()](path)
    except (ValueError, OSError, ImportError, Warning) as error:
        raise ValueError(f"{path} could not be read: {first_line(error)}") from error
    text_names = [name for name in (config.text_column, config.text_pair_column) if name]
    group_name = config.group_column if grouped else None
    for name in [*text_names, config.label_column, *([group_name] if group_name else [])]:
        if name not in columns:
            raise ValueError(
                f"{path} has no column {name!r}; its columns are {', '.join(map(repr, columns)) or 'none'}"
            )

    if not len(columns[config.label_column]):
        raise ValueError(f"{path} has no rows")

    def cells(name: str, parse: Callable[[Any], Any], what: str) -> list[Any]:
        parsed = [parse(cell) for cell in columns[name]]
        if None in parsed:
            raise ValueError(f"{path} row {parsed.index(None) + 1} has no {what} in column {name!r}")
        return parsed

    texts = [cells(name, _parse_text, "text") for name in text_names]
    labels = cells(config.label_column, _parse_label, "label")
    groups = tuple(cells(group_name, _parse_text, "group")) if group_name else None
    return Table(path, tuple(zip(*texts, strict=True)), tuple(labels), groups)


def first_line(error: BaseException) -> str:
    """Return the first line of an error's message, or its kind if it has none."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def _parse_text(cell: Any) -> str | None:
    text = _scalar(cell)
    return str(text) if text is not None and str(text).strip() else None


def _parse_label(cell: Any) -> str | int | float | None:
    label = _scalar(cell)
    if label is None or not str(label).strip():
        return None
    try:
        number = float(label) if not isinstance(label, bool) else math.nan
    except ValueError:
        number = math.nan
    if not math.isfinite(number):
        return str(label).strip()
    return int(number) if number.is_integer() else number


def _scalar(cell: Any) -> str | int | float | None:
    """Return a cell's text or number; None for anything that is neither, such as a null or a list."""
    if isinstance(cell, float) and not math.isfinite(cell):
        return None
    return cell if isinstance(cell, str | int | float) else None


def _read_csv(path: Path) -> Columns:
    return _read_separated(path, ",")


def _read_tsv(path: Path) -> Columns:
    return _read_separated(path, "\t")


def _read_separated(path: Path, separator: str) -> Columns:
    import pandas

    with warnings.catch_warnings():
        warnings.simplefilter("error", pandas.errors.ParserWarning)  # more cells than columns: an unquoted separator
        # every cell as it stands: "NA", "null" and "007" are text
        frame = pandas.read_csv(
            path, sep=separator, dtype=str, keep_default_na=False, index_col=False, encoding="utf-8-sig"
        )
    return {str(name): frame[name].tolist() for name in frame.columns}


def _read_jsonl(path: Path) -> Columns:
    rows: list[dict[str, Any]] = []
    with path.open(encoding="utf-8-sig") as file:
        for number, line in enumerate(file, start=1):
            if not line.strip():
                continue
            try:
                row = json.loads(line)
            except ValueError as error:
                raise ValueError(f"line {number} is no JSON: {error}") from None
            if not isinstance(row, dict):
                raise ValueError(f"line {number} is no JSON object")
            rows.append(row)
    names = dict.fromkeys(name for row in rows for name in row)
    return {name: [row.get(name) for row in rows] for name in names}


def _read_parquet(path: Path) -> Columns:
    import pandas

    # nullable types: a column of whole numbers with gaps stays one
    frame = pandas.read_parquet(path, dtype_backend="numpy_nullable")
    return {str(name): frame[name].tolist() for name in frame.columns}


FORMATS: dict[str, Callable[[Path], Columns]] = {
    ".csv": _read_csv,
    ".tsv": _read_tsv,
    ".jsonl": _read_jsonl,
    ".parquet": _read_parquet,
}
