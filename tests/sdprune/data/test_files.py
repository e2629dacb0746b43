"""The user's own files: every format, every split, and a message for everything that can be wrong."""

import csv
import json
import random
from pathlib import Path
from typing import Any

import pytest

from sdprune.data.tasks import load_task
from sdprune.recipe import DataConfig

Rows = list[dict[str, Any]]


def make_rows(count: int = 40, labels: tuple[Any, ...] = ("bad", "good")) -> Rows:
    return [{"text": f"film {row}", "label": labels[row % len(labels)]} for row in range(count)]


def write(path: Path, rows: Rows) -> str:
    if path.suffix == ".jsonl":
        path.write_text("\n".join(map(json.dumps, rows)) + "\n", encoding="utf-8")
    elif path.suffix == ".parquet":
        import pandas

        pandas.DataFrame(rows).to_parquet(path)
    else:
        with path.open("w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, rows[0], delimiter="\t" if path.suffix == ".tsv" else ",")
            writer.writeheader()
            writer.writerows(rows)
    return str(path)


def load(path: Path, rows: Rows, **options: Any):
    return load_task(DataConfig(data=write(path, rows), **options))


def all_texts(task) -> set[str]:
    return {text for part in (task.train, task.validation, task.test) for texts in part.texts for text in texts}


@pytest.mark.parametrize("suffix", ["csv", "tsv", "jsonl", "parquet"])
def test_every_format_gives_the_same_task(suffix, tmp_path):
    rows = make_rows()
    for row, text in enumerate(["NA", "null", "None", "nan", "N/A", 'a, "b"\tc', "007", "line\nbreak", "größe 映画"]):
        rows[row]["text"] = text
    task = load(tmp_path / f"data.{suffix}", rows)
    assert (task.label_names, task.num_labels) == (("bad", "good"), 2)
    assert task.metrics == ("accuracy", "macro_f1")
    assert (len(task.train), len(task.validation), len(task.test)) == (27, 3, 10)
    assert all_texts(task) == {row["text"] for row in rows}
    expected = {row["text"]: row["label"] for row in rows}
    for (text,), label in zip(task.train.texts, task.train.labels, strict=True):
        assert task.label_names[label] == expected[text]


def test_works_without_the_package_datasets(tmp_path, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "datasets", None)
    assert len(load(tmp_path / "data.csv", make_rows()).train) == 27


@pytest.mark.parametrize(
    ("labels", "names"),
    [
        ((1, -1), ("-1", "1")),
        ((10, 9, 2), ("2", "9", "10")),
        ((0.0, 1.0), ("0", "1")),
        ((True, False), ("False", "True")),
        (("1", "two"), ("1", "two")),
        (("nan", "inf"), ("inf", "nan")),
    ],
)
@pytest.mark.parametrize("suffix", ["csv", "jsonl"])
def test_class_names(labels, names, suffix, tmp_path):
    task = load(tmp_path / f"data.{suffix}", make_rows(labels=labels))
    as_written = str if suffix == "csv" else lambda label: str(label).removesuffix(".0")
    if labels == (0.0, 1.0) and suffix == "csv":  # text, which JSON tells from a number
        names = ("0.0", "1.0")
    assert task.label_names == names
    first = dict(zip(task.train.texts, task.train.labels, strict=True))
    row = int(next(iter(first))[0].removeprefix("film "))
    assert names[first[f"film {row}",]] == as_written(labels[row % len(labels)])


@pytest.mark.parametrize("suffix", ["csv", "jsonl", "parquet"])
def test_numbers_are_predicted_as_numbers(suffix, tmp_path):
    task = load(tmp_path / f"data.{suffix}", make_rows(labels=(0.5, 2.0, 4.25)))
    assert (task.label_names, task.num_labels, task.metrics) == ((), 1, ("pearson", "spearman"))
    assert set(task.train.labels) == {0.5, 2.0, 4.25}
    assert all(type(label) is float for label in task.test.labels)


def test_pairs_of_texts(tmp_path):
    rows = [{"first": f"a {row}", "second": f"b {row}", "same": row % 2} for row in range(40)]
    options = {"text_column": "first", "text_pair_column": "second", "label_column": "same"}
    task = load(tmp_path / "data.csv", rows, **options)
    assert all(first[1:] == second[1:] for first, second in task.train.texts)


def test_groups_stay_together(tmp_path):
    rows = [row | {"film": f"title {number // 5}"} for number, row in enumerate(make_rows(100))]
    task = load(tmp_path / "data.csv", rows, group_column="film")
    group_of = {(row["text"],): row["film"] for row in rows}
    groups = [{group_of[texts] for texts in part.texts} for part in (task.train, task.validation, task.test)]
    assert sum(map(len, groups)) == 20
    assert len(groups[2]) >= 5


def test_files_of_their_own(tmp_path):
    validation = write(tmp_path / "validation.jsonl", make_rows(6))
    test = write(tmp_path / "test.parquet", make_rows(5))
    task = load(tmp_path / "train.csv", make_rows(), validation_data=validation, test_data=test)
    assert (len(task.train), len(task.validation), len(task.test)) == (40, 6, 5)
    task = load(tmp_path / "train.csv", make_rows(), test_data=test)
    assert (len(task.train), len(task.validation), len(task.test)) == (36, 4, 5)


def test_fewer_rows_keep_the_balance_and_repeat(tmp_path):
    options = {"max_train_samples": 40, "max_eval_samples": 20}
    rows = make_rows(400, labels=("a", "b", "b", "b"))
    random.Random(0).shuffle(rows)
    task = load(tmp_path / "data.csv", rows, **options)
    assert (len(task.train), len(task.validation), len(task.test)) == (40, 20, 20)
    assert task.train.labels.count(0) == pytest.approx(10, abs=1)
    assert task.test.labels.count(0) == pytest.approx(5, abs=1)
    assert task == load(tmp_path / "data.csv", rows, **options)
    assert task != load(tmp_path / "data.csv", rows, **options, split_seed=1)


def changed(row: int, **cells: Any) -> Rows:
    rows = make_rows()
    rows[row] |= cells
    return rows


@pytest.mark.parametrize(
    ("rows", "options", "message"),
    [
        (make_rows(), {"text_column": "body"}, "no column 'body'; its columns are 'text', 'label'"),
        (make_rows(), {"label_column": "y"}, "no column 'y'"),
        (make_rows(), {"group_column": "film"}, "no column 'film'"),
        (make_rows(), {"text_pair_column": "second"}, "no column 'second'"),
        (changed(2, text=""), {}, "row 3 has no text in column 'text'"),
        (changed(2, text="  "), {}, "row 3 has no text"),
        (changed(2, text=None), {}, "row 3 has no text"),
        (changed(4, label=""), {}, "row 5 has no label in column 'label'"),
        (changed(4, label=None), {}, "row 5 has no label"),
        ([row | {"film": ""} for row in make_rows()], {"group_column": "film"}, "row 1 has no group"),
        ([row | {"film": "one"} for row in make_rows()], {"group_column": "film"}, "too few rows or groups"),
        (make_rows(labels=("good",)), {}, "holds a single class, 'good'"),
        (make_rows(7), {}, "has 7 rows; at least 8 are needed"),
    ],
)
@pytest.mark.parametrize("suffix", ["csv", "jsonl"])
def test_bad_rows(rows, options, message, suffix, tmp_path):
    with pytest.raises(ValueError, match=message) as raised:
        load(tmp_path / f"data.{suffix}", rows, **options)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("data.csv", "text,label\na film, a plot,1\n", "could not be read: Length of header"),
        ("data.csv", "text,label\na,1\na, b,1\n", "could not be read: Error tokenizing data.*line 3"),
        ("data.csv", "text,label\ngood\n", "row 1 has no label"),
        ("data.csv", "", "could not be read: No columns"),
        ("data.csv", "text,label\n", "has no rows"),
        ("data.jsonl", '{"text": "a", "label": 1}\n{"text"\n', "could not be read: line 2 is no JSON"),
        ("data.jsonl", "[1]\n", "line 1 is no JSON object"),
        ("data.jsonl", '{"text": ["a"], "label": 1}\n', "row 1 has no list of tags"),
        ("data.jsonl", '{"text": "a", "label": NaN}\n', "row 1 has no label"),
        ("data.jsonl", "", "no column 'text'; its columns are none"),
        ("data.parquet", "text", "could not be read"),
        ("data.txt", "text", "unknown extension; known are .csv, .tsv, .jsonl, .parquet"),
    ],
)
def test_bad_files(name, content, message, tmp_path):
    (tmp_path / name).write_text(content)
    with pytest.raises(ValueError, match=message) as raised:
        load_task(DataConfig(data=str(tmp_path / name)))
    assert "\n" not in str(raised.value)


def test_missing_files(tmp_path):
    with pytest.raises(ValueError, match=r"no such file: .*absent\.csv"):
        load_task(DataConfig(data=str(tmp_path / "absent.csv")))
    with pytest.raises(ValueError, match=r"no such file: .*absent\.csv"):
        load(tmp_path / "data.csv", make_rows(), test_data=str(tmp_path / "absent.csv"))


@pytest.mark.parametrize(
    ("train", "test", "message"),
    [
        (("bad", "good"), ("bad", "fine"), r"row 2: the training rows never have the label 'fine', only 'bad', 'good'"),
        ((0.5, 1.5), ("1.5", "high"), "row 2: the label 'high' is no number"),
    ],
)
def test_labels_of_the_test_file_must_be_known(train, test, message, tmp_path):
    path = write(tmp_path / "test.csv", make_rows(labels=test))
    with pytest.raises(ValueError, match=message):
        load(tmp_path / "data.csv", make_rows(labels=train), test_data=path)


def test_labels_of_held_out_groups_must_be_trained_on(tmp_path):
    rows = [row | {"film": row["label"]} for row in make_rows(labels=("a", "b", "c", "d"))]
    with pytest.raises(ValueError, match=r"label '.' occurs in the validation part, but in no training row"):
        load(tmp_path / "data.csv", rows, group_column="film")
