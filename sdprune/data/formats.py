"""Columns out of a user's CSV, TSV, JSONL or Parquet file, every cell as it stands there."""

import csv
import io
import json
import logging
import re
import warnings
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Literal

Columns = Mapping[str, Sequence[Any]]
SEPARATORS = (",", ";", "\t", "|")

logger = logging.getLogger(__name__)


def read_columns(path: Path, names: Sequence[str]) -> Columns:
    """Read a file; its extension tells the format.

    CSV and TSV are read as RFC 4180 has them (https://www.rfc-editor.org/rfc/rfc4180), in UTF-8 or, where a byte order
    mark says so, UTF-16. Where the header has the columns only between other separators (of `SEPARATORS`), these
    count. A TSV whose lines all have as many cells as its header holds one row a line: quotation marks that would join
    lines or cells are text there, as in GLUE's own files.

    Args:
        path: the file.
        names: the columns that will be asked for.

    Raises:
        ValueError: another extension, or a file that cannot be read; the line is named where one is to blame.
    """
    if path.suffix.lower() not in FORMATS:
        raise ValueError(f"{path} has an unknown extension; known are {', '.join(FORMATS)}")
    try:
        return FORMATS[path.suffix.lower()](path, names)
    except (ValueError, OSError, ImportError, Warning, csv.Error) as error:
        raise ValueError(f"{path} could not be read: {first_line(error)}") from error


def first_line(error: BaseException) -> str:
    """Return the first line of an error's message, or its kind if it has none."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def _read_text(path: Path) -> str:
    """Return a text without its byte order mark, which also tells UTF-16; line ends as they are."""
    content = path.read_bytes()
    encoding = "UTF-16" if content.startswith((b"\xff\xfe", b"\xfe\xff")) else "UTF-8"
    try:
        text = content.decode(encoding).removeprefix("\ufeff")
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        raise ValueError(f"line {line} is no {encoding} text ({error.reason}); save the file as UTF-8") from None
    if "\0" in text:
        raise ValueError(f"line {_line(text, text.index(chr(0)))} holds a NUL character; save the file as UTF-8")
    return text


def _read_separated(path: Path, names: Sequence[str], *, separator: str) -> Columns:
    import pandas

    text = _read_text(path)
    header = next(filter(None, _lines(text)), "")
    found = next((each for each in (separator, *SEPARATORS) if set(names) <= set(_cells(header, each))), separator)
    if found != separator:
        logger.info("%s: its cells are separated by %r", path, found)
    heads = _cells(header, found)
    twice = next((name for name in names if heads.count(name) > 1), None)
    if twice is not None:
        raise ValueError(f"the header has {heads.count(twice)} columns {twice!r}")
    with warnings.catch_warnings():
        warnings.simplefilter("error", pandas.errors.ParserWarning)  # more cells than columns: an unquoted separator
        # every cell as it stands: "NA", "null" and "007" are text
        quoting = _quoting(text, found)
        try:
            frame = pandas.read_csv(
                io.StringIO(text), sep=found, dtype=str, keep_default_na=False, index_col=False, quoting=quoting
            )
        except (pandas.errors.ParserError, pandas.errors.ParserWarning) as error:
            advice = f"a row has more cells than the header; a cell that holds {found!r} needs quotation marks"
            raise ValueError(f"{first_line(error)} ({advice})") from error
    return {str(name): frame[name].tolist() for name in frame.columns}


def _quoting(text: str, separator: str) -> Literal[0, 3]:
    """Tell whether quotation marks enclose cells, or are text like any other.

    Raises:
        ValueError: neither fits: a cell that begins with a mark does not end with one.
    """
    ends = rf"[{re.escape(separator)}\r\n]"
    # a cell in quotation marks: what it holds, and the character behind it where it is not at its end there
    quoted = re.compile(rf'(?:\A|(?<={ends}))"((?:[^"]|"")*)(?:\Z|"((?!{ends}).|))', re.DOTALL)
    joins, broken = False, None
    for match in quoted.finditer(text):
        across = separator == "\t" and separator in match[1] and re.search(r"[\r\n]", match[1]) is not None
        joins = joins or re.search(ends, match[1]) is not None
        if (match[2] != "" or across) and broken is None:
            broken = match.start()
    if separator == "\t" and (joins or broken is not None) and _one_row_a_line(text, separator):
        return 3  # csv.QUOTE_NONE
    if broken is not None:
        raise ValueError(
            f"line {_line(text, broken)} has a quotation mark that is not closed there, or text behind the closing one "
            '(a mark within quotation marks is written twice: "")'
        )
    return 0  # csv.QUOTE_MINIMAL


def _one_row_a_line(text: str, separator: str) -> bool:
    counts = {line.count(separator) for line in _lines(text) if line.strip(" ")}
    return len(counts) == 1


def _lines(text: str) -> list[str]:
    return re.split("\r\n|\r|\n", text)  # splitlines knows ends of lines that stand in texts as well


def _cells(line: str, separator: str) -> list[str]:
    return next(csv.reader([line], delimiter=separator), [])


def _line(text: str, place: int) -> int:
    return len(_lines(text[:place]))


def _read_jsonl(path: Path, names: Sequence[str]) -> Columns:
    rows: list[dict[str, Any]] = []
    for number, line in enumerate(_lines(_read_text(path)), start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except ValueError as error:
            raise ValueError(f"line {number} is no JSON: {error}") from None
        if not isinstance(row, dict):
            raise ValueError(f"line {number} is no JSON object")
        rows.append(row)
    keys = dict.fromkeys(name for row in rows for name in row)
    return {name: [row.get(name) for row in rows] for name in keys}


def _read_parquet(path: Path, names: Sequence[str]) -> Columns:
    import pandas

    # nullable types: a column of whole numbers with gaps stays one
    frame = pandas.read_parquet(path, dtype_backend="numpy_nullable")
    return {
        str(name): [cell.tolist() if hasattr(cell, "tolist") else cell for cell in frame[name].tolist()]
        for name in frame.columns
    }


FORMATS: dict[str, Callable[[Path, Sequence[str]], Columns]] = {
    ".csv": partial(_read_separated, separator=","),
    ".tsv": partial(_read_separated, separator="\t"),
    ".jsonl": _read_jsonl,
    ".parquet": _read_parquet,
}
