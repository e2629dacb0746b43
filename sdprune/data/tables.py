"""Labelled text out of the columns of a user's file; rows may hold words with a tag each."""

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from sdprune.data.examples import Examples
from sdprune.data.formats import read_columns
from sdprune.data.labels import CLASS, CLASSES, NUMBER, Target, are_whole, as_number, sorted_names
from sdprune.recipe import DataConfig


@dataclass(frozen=True)
class Table:
    """What a file holds. A label is a name: its text as it stands there, without white space around it.

    Args:
        path: the file.
        texts: one or two texts a row; or the words of every row.
        labels: labels of every row: one, or any number of them, or one a word.
        groups: group of every row, or None.
        tagged: whether the words have the labels, and not the rows.
        listed: whether the labels of a row are told as a list.
    """

    path: Path
    texts: tuple[tuple[str, ...], ...]
    labels: tuple[tuple[str, ...], ...]
    groups: tuple[str, ...] | None
    tagged: bool
    listed: bool = False

    @property
    def names(self) -> set[str]:
        """The distinct labels."""
        return {label for labels in self.labels for label in labels}

    def decided(self, target: Target) -> Target:
        """Return what the labels are taken for, and why: where `target` leaves it open, as they suggest themselves.

        Raises:
            ValueError: labels of words are taken for something else than classes.
        """
        if self.tagged and target.label_type not in (None, CLASS):
            raise ValueError(
                f"label_type must be 'class' where every word has a label, as in {self.path}, got "
                f"{target.label_type!r} ({target.reason})"
            )
        if target.label_type is not None:
            return target
        if self.tagged:
            return replace(target, label_type=CLASS, reason="every word has a label")
        if self.listed:
            return replace(target, label_type=CLASSES, reason="a row may have several labels")
        if target.trained:
            return replace(target, label_type=CLASS)
        if are_whole(self.names) or None in map(as_number, self.names):
            numbers = "whole numbers" if are_whole(self.names) else "names"
            return Target(CLASS, f"the labels are {numbers}")
        return Target(NUMBER, "the labels are numbers, not all of them whole")

    def class_names(self, label_type: str, others: Iterable[str] = (), *, scored: bool = False) -> tuple[str, ...]:
        """Return the sorted names of the classes; none where numbers are predicted.

        Args:
            label_type: what the labels are taken for.
            others: labels in other files that count as well.
            scored: whether rows are only scored, so that a single class will do.

        Raises:
            ValueError: all labels are equal where every row has one, or no row has any.
        """
        distinct = self.names | set(others)
        if not distinct:
            raise ValueError(f"{self.path}: no row has a label")
        if len(distinct) == 1 and not scored and label_type != CLASSES:
            what = "number" if label_type == NUMBER else "class"
            raise ValueError(f"{self.path} holds a single {what}, {str(*distinct)!r}; two are needed")
        return () if label_type == NUMBER else sorted_names(distinct)

    def examples(self, label_type: str, class_names: Sequence[str], reason: str) -> Examples:
        """Return the rows with labels as indices into `class_names`, or as numbers.

        Args:
            label_type: what the labels are taken for.
            class_names: of `class_names`.
            reason: why the labels are taken for that, for messages.

        Raises:
            ValueError: a label is no class or no number, or a row has not one label; the message names the row.
        """
        index = {name: place for place, name in enumerate(class_names)}
        for row, labels in enumerate(self.labels, start=1):
            if len(labels) != 1 and not self.tagged and label_type != CLASSES:
                raise ValueError(
                    f"{self.path} row {row} has {len(labels)} labels, but every row must have one ({reason})"
                )
            for label in labels:
                if label_type == NUMBER and as_number(label) is None:
                    raise ValueError(f"{self.path} row {row}: the label {label!r} is no number ({reason})")
                if label_type != NUMBER and label not in index:
                    raise ValueError(
                        f"{self.path} row {row}: the training rows never have the label {label!r}, "
                        f"only {', '.join(map(repr, class_names))}"
                    )
        if label_type == NUMBER:
            return Examples(self.texts, tuple(as_number(label) or 0.0 for (label,) in self.labels))
        rows = [tuple(index[label] for label in labels) for labels in self.labels]
        if self.tagged:
            return Examples(self.texts, tuple(rows))
        if label_type == CLASSES:
            return Examples(self.texts, tuple(map(frozenset, rows)))
        return Examples(self.texts, tuple(place for (place,) in rows))


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
    text_names = [name for name in (config.text_column, config.text_pair_column) if name]
    group_name = config.group_column if grouped else None
    names = [*text_names, config.label_column, *([group_name] if group_name else [])]
    columns = read_columns(path, names)
    for name in names:
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
        listed = config.label_separator is not None or any(isinstance(c, list) for c in columns[config.label_column])
        labels = cells(config.label_column, partial(_parse_labels, separator=config.label_separator), "label")
        _check_not_indicators(path, config.label_column, labels)
        labels = [tuple(dict.fromkeys(row)) for row in labels]
        return Table(path, tuple(zip(*texts, strict=True)), tuple(labels), groups, False, listed)
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


def _check_not_indicators(path: Path, name: str, labels: Sequence[tuple[str, ...]]) -> None:
    """Raise ValueError for lists that tell by 0 and 1 whether a row has each class: as names they would be two."""
    sizes = set(map(len, labels))
    if len(sizes) == 1 and min(sizes) > 1 and {label for row in labels for label in row} <= {"0", "1"}:
        raise ValueError(f"{path}: the lists in column {name!r} hold 0 or 1 for every class; list the classes by name")


def _parse_text(cell: Any) -> str | None:
    text = _scalar(cell)
    return str(text) if text is not None and str(text).strip() else None


def _parse_label(cell: Any) -> str | None:
    """Return a label's text; of numbers that JSON and Parquet tell from text, a whole one has no decimals."""
    label = _scalar(cell)
    if isinstance(label, float) and label.is_integer() and abs(label) < 2**53:
        label = int(label)
    return None if label is None or not str(label).strip() else str(label).strip()


def _parse_labels(cell: Any, separator: str | None) -> tuple[str, ...] | None:
    """Return the labels of a row: the entries of a list, the parts of a text, or the one that stands there."""
    if separator is not None and isinstance(cell, str):
        return tuple(part.strip() for part in cell.split(separator) if part.strip())
    if isinstance(cell, list):
        parsed = tuple(map(_parse_label, cell))
        return None if None in parsed else tuple(label for label in parsed if label is not None)
    label = _parse_label(cell)
    return None if label is None else (label,)


def _parse_tag(cell: Any) -> str | None:
    label = _parse_label(cell)
    return None if isinstance(cell, float) and label is not None and not cell.is_integer() else label


def _parse_list(cell: Any, parse: Callable[[Any], Any]) -> tuple[Any, ...] | None:
    """Return the parsed entries of a list; None for anything else, for no entries, and where one cannot be parsed."""
    parsed = tuple(map(parse, cell)) if isinstance(cell, list) else ()
    return parsed if parsed and None not in parsed else None


def _scalar(cell: Any) -> str | int | float | None:
    """Return a cell's text or number; None for anything that is neither, such as a null or a list."""
    if isinstance(cell, float) and not math.isfinite(cell):
        return None
    return cell if isinstance(cell, str | int | float) else None
