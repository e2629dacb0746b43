"""Labelled text in a user's CSV, TSV, JSONL or Parquet file; the last two may hold words with a tag each."""

import json
import math
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
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
        texts: one or two texts a row; or the words of every row.
        labels: labels of every row: one, or one a word.
        groups: group of every row, or None.
        tagged: whether the words have the labels, and not the rows.
    """

    path: Path
    texts: tuple[tuple[str, ...], ...]
    labels: tuple[tuple[str | int | float, ...], ...]
    groups: tuple[str, ...] | None
    tagged: bool

    def class_names(self) -> tuple[str, ...]:
        """Return the sorted names of the classes; none if the labels are numbers that are not all whole.

        Raises:
            ValueError: all labels are equal.
        """
        distinct = {label for labels in self.labels for label in labels}
        if len(distinct) == 1:
            raise ValueError(f"{self.path} holds a single class, {str(*distinct)!r}; two are needed")
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
        for row, label in ((row, label) for row, labels in enumerate(self.labels, start=1) for label in labels):
            if class_names and str(label) not in index:
                raise ValueError(
                    f"{self.path} row {row}: the training rows never have the label {str(label)!r}, "
                    f"only {', '.join(map(repr, class_names))}"
                )
            if not class_names and isinstance(label, str):
                raise ValueError(
                    f"{self.path} row {row}: the label {label!r} is no number, but the training labels are"
                )
        if self.tagged:
            return Examples(self.texts, tuple(tuple(index[str(tag)] for tag in tags) for tags in self.labels))
        labels = [label for (label,) in self.labels]
        return Examples(
            self.texts, tuple((index[str(label)] for label in labels) if class_names else map(float, labels))
        )


def read_table(path: Path, config: DataConfig, *, grouped: bool) -> Table:
    """Read the columns that `config` names; rows in messages are counted from 1 after any header.

    Where the text column holds lists, these are words, and the label column holds lists of as many tags.

    Args:
        path: the file; its extension tells the format.
        config: names of the columns.
        grouped: read the group column too, if one is named.

    Raises:
        ValueError: there is no such file, it cannot be read, it has no rows, a column is missing, a row has no
            text, label or group, or not as many tags as words.
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

    groups = tuple(cells(group_name, _parse_text, "group")) if group_name else None
    if not any(isinstance(cell, list) for cell in columns[config.text_column]):
        texts = [cells(name, _parse_text, "text") for name in text_names]
        labels = cells(config.label_column, _parse_label, "label")
        return Table(path, tuple(zip(*texts, strict=True)), tuple((label,) for label in labels), groups, False)
    if config.text_pair_column:
        raise ValueError(f"{path}: column {config.text_column!r} holds lists of words, which have no text_pair_column")
    words = cells(config.text_column, lambda cell: _parse_list(cell, _parse_text), "list of words")
    tags = cells(config.label_column, lambda cell: _parse_list(cell, _parse_tag), "list of tags")
    for row, pair in enumerate(zip(words, tags, strict=True), start=1):
        if len(pair[0]) != len(pair[1]):
            raise ValueError(
                f"{path} row {row} has {len(pair[0])} words in column {config.text_column!r}, "
                f"but {len(pair[1])} tags in column {config.label_column!r}"
            )
    return Table(path, tuple(words), tuple(tags), groups, True)


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


def _parse_tag(cell: Any) -> str | int | None:
    label = _parse_label(cell)
    return None if isinstance(label, float) else label


def _parse_list(cell: Any, parse: Callable[[Any], Any]) -> tuple[Any, ...] | None:
    """Return the parsed entries of a list; None for anything else, for no entries, and where one cannot be parsed."""
    parsed = tuple(map(parse, cell)) if isinstance(cell, list) else ()
    return parsed if parsed and None not in parsed else None


def _scalar(cell: Any) -> str | int | float | None:
    """Return a cell's text or number; None for anything that is neither, such as a null or a list."""
    if isinstance(cell, float) and not math.isfinite(cell):
        return None
    return cell if isinstance(cell, str | int | float) else None


def _read_separated(path: Path, *, separator: str) -> Columns:
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
    return {
        str(name): [cell.tolist() if hasattr(cell, "tolist") else cell for cell in frame[name].tolist()]
        for name in frame.columns
    }


FORMATS: dict[str, Callable[[Path], Columns]] = {
    ".csv": partial(_read_separated, separator=","),
    ".tsv": partial(_read_separated, separator="\t"),
    ".jsonl": _read_jsonl,
    ".parquet": _read_parquet,
}
