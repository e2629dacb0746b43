"""A walk over the delimiters, quotation marks, line ends and encodings that CSV and TSV files come in."""

import csv
import io
import itertools
import logging

import pandas
import pytest

from sdprune.data.formats import read_columns

TEXTS = (
    "plain",
    "a, b",
    'said "hi"',
    "two\nlines",
    "tab\there",
    "semi;colon",
    "bar|bar",
    "größe 映画 🎬",
    "'apostrophe'",
    "x\u2028y",
)


def columns(path, content, names=("text", "label")):
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return read_columns(path, names)


def refused(path, content, message):
    with pytest.raises(ValueError, match=message) as raised:
        columns(path, content)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize("suffix", ["csv", "tsv"])
@pytest.mark.parametrize("delimiter", [",", ";", "\t", "|"])
@pytest.mark.parametrize("quoting", [csv.QUOTE_MINIMAL, csv.QUOTE_ALL])
@pytest.mark.parametrize("end", ["\n", "\r\n", "\r"])
def test_what_the_csv_module_writes(suffix, delimiter, quoting, end, tmp_path, caplog):
    file = io.StringIO()
    writer = csv.writer(file, delimiter=delimiter, quoting=quoting, lineterminator=end)
    ambiguous = end == "\r" and quoting == csv.QUOTE_MINIMAL  # the other line ends stand without marks then
    texts = [text for text in TEXTS if not (ambiguous and "\n" in text)]
    labels = [("good", "bad")[row % 2] for row in range(len(texts))]
    writer.writerows([("text", "label"), *zip(texts, labels, strict=True)])
    with caplog.at_level(logging.INFO, "sdprune"):
        found = columns(tmp_path / f"data.{suffix}", file.getvalue())
    assert found == {"text": texts, "label": labels}
    usual = delimiter == {"csv": ",", "tsv": "\t"}[suffix]
    assert (f"its cells are separated by {delimiter!r}" in caplog.text) != usual


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16"])
def test_what_pandas_writes(encoding, tmp_path):
    frame = pandas.DataFrame({"id": range(len(TEXTS)), "text": TEXTS, "label": "x"})
    frame.to_csv(tmp_path / "data.csv", index=False, encoding=encoding)
    assert columns(tmp_path / "data.csv", (tmp_path / "data.csv").read_bytes())["text"] == list(TEXTS)


@pytest.mark.parametrize(
    ("content", "texts"),
    [
        ('text\tlabel\n"a\tx\nb\ty\n"c\tx\n', ['"a', "b", '"c']),
        ('text\tlabel\n"a\tx\nb"\ty\nc\tx\n', ['"a', 'b"', "c"]),  # closed, but on another line
        ('text\tlabel\nsaid "hi"\tx\n"\ty\nc\tx\n', ['said "hi"', '"', "c"]),
        ('text\tlabel\n"a" and b\tx\n"b"\ty\n""\tx\n', ['"a" and b', '"b"', '""']),
        ('text\tlabel\n"a ""q"""\tx\n"b"\ty\n"c"\tx\n', ['a "q"', "b", "c"]),  # each is whole: marks enclose cells
        ('text\tlabel\n"two\nlines"\tx\nb\ty\nc\tx\n', ["two\nlines", "b", "c"]),
        ('text\tlabel\n"a\tb"\tx\nb\ty\nc\tx\n', ["a\tb", "b", "c"]),
    ],
)
def test_quotation_marks_in_tsv(content, texts, tmp_path):
    assert columns(tmp_path / "data.tsv", content) == {"text": texts, "label": ["x", "y", "x"]}


@pytest.mark.parametrize("places", list(itertools.combinations(range(6), 2)))
def test_no_mark_makes_rows_vanish(places, tmp_path):
    """Two stray marks anywhere at the beginnings of cells: every row is there, or an error names a line."""
    cells = [f'"{cell}' if place in places else cell for place, cell in enumerate("axbycx")]
    lines = [cells[row : row + 2] for row in (0, 2, 4)]
    found = columns(tmp_path / "data.tsv", "\n".join(["text\tlabel", *map("\t".join, lines), ""]))
    assert list(zip(found["text"], found["label"], strict=True)) == list(map(tuple, lines))
    content = "\n".join(["text,label", *map(",".join, lines), ""])
    refused(tmp_path / "data.csv", content, f"line {places[0] // 2 + 2} has a quotation mark")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('text,label\n"a,x\nb,y\n"c,x\n', "line 2 has a quotation mark that is not closed there, or text behind"),
        ('text,label\nb,y\n"c,x\n', "line 3 has a quotation mark that is not closed there"),
        ('text,label\n"two\nlines",x\n"said "hi"",y\n', "line 4 has a quotation mark"),
        ('text,label\n"said \\"hi\\"",y\n', "line 2 has a quotation mark"),
        ("text,label\na,x\nb,y,z\n", "Error tokenizing data.* line 3"),
        ("text,label,text\na,x,b\n", "the header has 2 columns 'text'"),
        ("text,label\ncafé,x\n".encode("latin-1"), "line 2 is no UTF-8 text .*; save the file as UTF-8"),
        ("text,label\na,x\n".encode("utf-16-le"), "line 1 holds a NUL character; save the file as UTF-8"),
        (b"\xff\xfet\0e\0x", "line 1 is no UTF-16 text"),
    ],
)
def test_what_cannot_be_read_names_its_line(content, message, tmp_path):
    refused(tmp_path / "data.csv", content, f"could not be read: {message}")


@pytest.mark.parametrize(
    "content",
    [
        'text\tlabel\n"a\tx\nb\ty\tz\nc\tx\n',
        'text\tlabel\tnote\n"a\tx\t1\nb\ty\nc"\tx\t2\n',  # closed, but across cells and lines
        'text\tlabel\n"a\tx\nb\ty\nc"\tx\nd\n',
    ],
)
def test_ragged_lines_in_tsv_with_stray_marks(content, tmp_path):
    refused(tmp_path / "data.tsv", content, "line 2 has a quotation mark")


def test_a_line_of_blanks_is_no_line(tmp_path):
    found = columns(tmp_path / "data.tsv", 'text\tlabel\n"a\tx\n  \nb"\ty\n')
    assert found["text"] == ['"a', 'b"']


def test_blank_lines_and_long_cells(tmp_path):
    text = "word " * 40_000  # more than the 131,072 characters of the csv module
    found = columns(tmp_path / "data.csv", f'\n\ntext,label\n\n"{text}, end",x\n\n')
    assert found == {"text": [f"{text}, end"], "label": ["x"]}


def test_lines_of_json_end_at_line_ends_only(tmp_path):
    (tmp_path / "data.jsonl").write_text(
        '{"text": "a\u2028b\x85c", "label": "x"}\r\n{"text": "d", "label": "y"}', "utf-8"
    )
    assert read_columns(tmp_path / "data.jsonl", ("text",)) == {"text": ["a\u2028b\x85c", "d"], "label": ["x", "y"]}
