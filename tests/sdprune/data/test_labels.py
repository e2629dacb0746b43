"""Labels are names: a walk over the forms in which files write them, and over the names that models have for them."""

import json
import logging
from dataclasses import replace

import pytest
from transformers import BertConfig

from sdprune.data.labels import CLASS, CLASSES, NUMBER, Target, as_number, match_classes, sorted_names, target_of
from sdprune.data.tasks import load_task
from sdprune.recipe import DataConfig

FORMS = {  # what stands in a cell, twice: the classes that it makes
    "digits": (("1", "10"), ("1", "10")),
    "decimals": (("1.0", "2.0"), ("1.0", "2.0")),
    "leading zeros": (("01", "1"), ("01", "1")),
    "equal as numbers": (("1", "1.0"), ("1", "1.0")),
    "exponents": (("1e3", "1000"), ("1000", "1e3")),
    "underscores": (("1_0", "10"), ("10", "1_0")),
    "signs": (("+1", "-1"), ("-1", "+1")),
    "other digits": (("\uff11", "1"), ("1", "\uff11")),
    "not finite": (("nan", "inf"), ("inf", "nan")),
    "truth": (("True", "false"), ("True", "false")),
    "case": (("a", "A"), ("A", "a")),
    "nothing": (("None", "null"), ("None", "null")),
    "missing": (("NA", "N/A"), ("N/A", "NA")),
    "hexadecimal": (("0x1", "0x2"), ("0x1", "0x2")),
    "dates": (("2024-01", "2023-12"), ("2023-12", "2024-01")),
    "versions": (("1.2.3", "1.2"), ("1.2", "1.2.3")),
    "spaces inside": (("not good", "good"), ("good", "not good")),
    "decimal commas": (("1,5", "2,5"), ("1,5", "2,5")),
}


def write(path, labels, count=40):
    """Write text in which the label of a row follows its number."""
    rows = [{"text": f"film {row}", "label": labels[row % len(labels)]} for row in range(count)]
    if path.suffix == ".jsonl":
        path.write_text("\n".join(map(json.dumps, rows)) + "\n")
    else:
        lines = [f'{row["text"]}\t"{row["label"]}"' for row in rows]
        path.write_text("\n".join(["text\tlabel", *lines]) + "\n")
    return DataConfig(data=str(path))


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("suffix", ["tsv", "jsonl"])
def test_texts_stay_what_they_are(form, suffix, tmp_path):
    labels, names = FORMS[form]
    task = load_task(write(tmp_path / f"data.{suffix}", labels))
    assert task.label_names == names
    for part in (task.train, task.validation, task.test):
        for (text,), label in zip(part.texts, part.labels, strict=True):
            assert names[label] == labels[int(text.removeprefix("film ")) % 2]


@pytest.mark.parametrize(
    ("labels", "names"),
    [
        ((1, 10, 2), ("1", "2", "10")),
        ((1.0, 2.0), ("1", "2")),
        ((1, 1.0, 2), ("1", "2")),
        ((True, False), ("False", "True")),
    ],
)
def test_numbers_that_the_file_tells_from_text(labels, names, tmp_path):
    assert load_task(write(tmp_path / "data.jsonl", labels)).label_names == names


def test_white_space_around_a_label_is_no_part_of_it(tmp_path):
    assert load_task(write(tmp_path / "data.jsonl", ("good ", " good", "bad\u00a0"))).label_names == ("bad", "good")


@pytest.mark.parametrize(
    ("text", "number"),
    [
        *(("1", 1.0), ("-2.5", -2.5), (".5", 0.5), ("3.", 3.0), ("1e3", 1000.0), ("+4", 4.0)),
        *((text, None) for text in ("", "nan", "inf", "1_0", "\uff11", "1,5", "0x1", " 1", "1e999", "one", "1.2.3")),
    ],
)
def test_what_a_number_is(text, number):
    assert as_number(text) == number


def test_the_order_of_names():
    assert sorted_names(["10", "9", "-1", "2.5"]) == ("-1", "2.5", "9", "10")
    assert sorted_names(["10", "9", "b"]) == ("10", "9", "b")


@pytest.mark.parametrize(
    ("ours", "theirs", "order", "reason"),
    [
        (("1", "2", "10"), ("1", "10", "2"), [0, 2, 1], "by name"),
        (("01", "1"), ("1", "01"), [1, 0], "by name"),
        (("a", "A"), ("A", "a"), [1, 0], "by name"),
        (("bad", "good"), ("Good", "Bad", "So-so"), [1, 0], "without regard to case"),
        (("1.0", "2.0", "10.0"), ("1", "10", "2"), [0, 2, 1], "as numbers"),
        (("01", "02"), ("2", "1"), [1, 0], "as numbers"),
        (("bad", "good"), ("LABEL_0", "LABEL_1"), [0, 1], "by order: 'bad' is 'LABEL_0', 'good' is 'LABEL_1'"),
        (("1", "10", "2"), ("LABEL_0", "LABEL_1", "LABEL_2"), [0, 2, 1], "by order: '1' is 'LABEL_0', '2' is"),
        (("1", "2"), ("LABEL_0", "LABEL_1", "LABEL_2"), [1, 2], "by index"),
        (("LABEL_1", "LABEL_0"), ("LABEL_0", "LABEL_1"), [1, 0], "by name"),
        (("-1", "0", "1"), ("negative", "neutral", "positive"), [0, 1, 2], "by order"),
        (("0", "2"), ("negative", "neutral", "positive"), [0, 2], "by index"),
        (("0.0", "1.0"), ("negative", "positive"), [0, 1], "by order"),
    ],
)
def test_matches(ours, theirs, order, reason):
    found, said = match_classes(ours, theirs)
    assert found == order
    assert reason in said


@pytest.mark.parametrize(
    ("ours", "theirs"),
    [
        (("neg", "pos"), ("good", "bad")),
        (("1", "2", "3"), ("0", "1", "2")),  # both are names, and they differ
        (("1", "1.0"), ("1", "2")),
        (("a", "A"), ("a", "b")),
        (("bad", "good"), ("LABEL_0", "LABEL_1", "LABEL_2")),  # which two?
        (("1", "2"), ("negative", "neutral", "positive")),  # counted from 0 or from 1?
        (("0", "5"), ("negative", "neutral", "positive")),
        (("0.5", "1.5"), ("negative", "positive")),
        (("x",), ("x", "x")),
    ],
)
def test_no_match_is_better_than_a_wrong_one(ours, theirs):
    assert match_classes(ours, theirs) is None


@pytest.mark.parametrize(
    ("fields", "label_type"),
    [
        ({"num_labels": 1}, NUMBER),
        ({"num_labels": 1, "problem_type": "regression"}, NUMBER),
        ({"num_labels": 3, "problem_type": "multi_label_classification"}, CLASSES),
        ({"num_labels": 3, "problem_type": "single_label_classification"}, CLASS),
        ({"num_labels": 3}, None),
    ],
)
def test_what_a_model_predicts(fields, label_type):
    assert target_of(BertConfig(**fields), None, trained=True).label_type == label_type
    assert target_of(BertConfig(**fields), None, trained=False).label_type is None
    assert target_of(BertConfig(**fields), CLASSES, trained=True).label_type == CLASSES
    with pytest.raises(ValueError, match=r"the model predicts 2 numbers a row .* one is supported"):
        target_of(BertConfig(num_labels=2, problem_type="regression"), None, trained=True)


def test_whole_scores_for_a_model_that_predicts_a_number(tmp_path, caplog):
    config = write(tmp_path / "data.tsv", ("1", "2", "3", "4", "5"))
    with caplog.at_level(logging.INFO, "sdprune"):
        task = load_task(config, target=target_of(BertConfig(num_labels=1), None, trained=True))
        assert load_task(config).label_names == ("1", "2", "3", "4", "5")
    assert (task.label_names, task.metrics) == ((), ("pearson", "spearman"))
    assert set(task.train.labels) == {1.0, 2.0, 3.0, 4.0, 5.0}
    assert "the labels are taken for numbers to predict, because the model has one output" in caplog.text
    assert "5 classes, one a row ('1', '2', '3', '4', '5'), because the labels are whole numbers" in caplog.text
    config = write(tmp_path / "data.tsv", ("1.5", "high"))
    with pytest.raises(ValueError, match=r"row 2: the label 'high' is no number \(the model has one output\)"):
        load_task(config, target=target_of(BertConfig(num_labels=1), None, trained=True))


def test_numbers_for_a_model_that_tells_classes(tmp_path):
    """What would be numbers to predict by itself are the names of its classes."""
    config = write(tmp_path / "data.tsv", ("1.1", "1.2"))
    assert load_task(config).label_names == ()
    assert load_task(config, target=target_of(BertConfig(num_labels=2), None, trained=True)).label_names == (
        "1.1",
        "1.2",
    )


def test_what_the_user_says_comes_first(tmp_path):
    write(tmp_path / "data.tsv", ("1", "2", "3"))
    assert load_task(DataConfig(data=str(tmp_path / "data.tsv"), label_type="number")).label_names == ()
    write(tmp_path / "data.tsv", ("1.5", "2.5"))
    assert load_task(DataConfig(data=str(tmp_path / "data.tsv"), label_type="class")).label_names == ("1.5", "2.5")


@pytest.mark.parametrize("separator", ["|", ", ", ";"])
def test_several_labels_in_a_cell(separator, tmp_path):
    labels = (f"funny{separator}sad", "sad", "", f"funny{separator}funny")
    write(tmp_path / "data.tsv", labels)
    task = load_task(DataConfig(data=str(tmp_path / "data.tsv"), label_separator=separator))
    assert (task.listed, task.label_names, task.metrics) == (True, ("funny", "sad"), ("micro_f1", "macro_f1"))
    expected = ({0, 1}, {1}, set(), {0})
    for (text,), found in zip(task.train.texts, task.train.labels, strict=True):
        assert found == expected[int(text.removeprefix("film ")) % 4]
    assert task.map(lambda rows: rows.renumbered([1, 0])).train.labels[0] == {
        1 - label for label in task.train.labels[0]
    }


def test_lists_of_labels(tmp_path):
    task = load_task(write(tmp_path / "data.jsonl", (["b", "a"], [], "c", [10])))
    assert (task.listed, task.label_names) == (True, ("10", "a", "b", "c"))
    assert set(task.train.labels) == {frozenset({1, 2}), frozenset(), frozenset({3}), frozenset({0})}
    alone = load_task(write(tmp_path / "data.jsonl", (["spam"], [])))  # there or not: one class will do
    assert (alone.listed, alone.label_names, set(alone.train.labels)) == (
        True,
        ("spam",),
        {frozenset({0}), frozenset()},
    )


@pytest.mark.parametrize(
    ("labels", "target", "message"),
    [
        ((["a"], ["a", "b"]), Target(CLASS, "the model has 2 classes", True), r"row 2 has 2 labels, .* must have one"),
        ((["a"], ["b"]), Target(NUMBER, "the model has one output", True), "row 1: the label 'a' is no number"),
        ((["a"], None), Target(), "row 2 has no label in column 'label'"),
        ((["a", None], ["b"]), Target(), "row 1 has no label in column 'label'"),
        (([], []), Target(), r"data\.jsonl: no row has a label"),
        ((["1", "0"], ["0", "0"]), Target(), "the lists in column 'label' hold 0 or 1 for every class"),
        (([0, 1, 1], [1, 0, 0]), Target(), "the lists in column 'label' hold 0 or 1 for every class; list the classes"),
    ],
)
def test_lists_that_do_not_fit(labels, target, message, tmp_path):
    with pytest.raises(ValueError, match=message) as raised:
        load_task(write(tmp_path / "data.jsonl", labels), target=target)
    assert "\n" not in str(raised.value)


def test_a_trained_model_knows_classes_that_a_file_lacks(tmp_path, caplog):
    known = Target(None, "the model has 3 classes", True)
    scored = replace(known, scored=True)
    assert load_task(write(tmp_path / "data.jsonl", ("good",)), target=scored).label_names == ("good",)
    with pytest.raises(ValueError, match="holds a single class, 'good'; two are needed"):
        load_task(write(tmp_path / "data.jsonl", ("good",)), target=known)  # from which nothing could be learnt
    test = write(tmp_path / "test.jsonl", ("fine",)).data
    config = write(tmp_path / "data.jsonl", ("bad", "good"))
    config = DataConfig(data=config.data, test_data=test)
    with caplog.at_level(logging.INFO, "sdprune"):
        task = load_task(config, target=known)
    assert task.label_names == ("bad", "fine", "good")
    assert set(task.test.labels) == {1}
    assert "label 'fine' occurs in the test part, but in no training row" in caplog.text
    with pytest.raises(ValueError, match="the training rows never have the label 'fine'"):
        load_task(config)


def test_words_have_classes_only(tmp_path):
    rows = [{"text": ["a", "film"], "label": ["1", "2"]}] * 10
    (tmp_path / "data.jsonl").write_text("\n".join(map(json.dumps, rows)))
    with pytest.raises(ValueError, match=r"label_type must be 'class' where every word has a label.* got 'number'"):
        load_task(DataConfig(data=str(tmp_path / "data.jsonl"), label_type="number"))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"label_type": "classs"}, r"label_type must be one of 'class', 'classes', 'number', got 'classs' \(did you"),
        ({"label_separator": ""}, "label_separator must be a text such as"),
        ({"label_separator": "|", "label_type": "class"}, "goes with label_type='classes', got .* label_type='class'"),
    ],
)
def test_options_are_checked(fields, message):
    with pytest.raises(ValueError, match=message):
        DataConfig(**fields)
    with pytest.raises(ValueError, match="label_type belongs to data in files, but data is the task 'sst2'"):
        load_task(DataConfig(data="sst2", label_type="class"))
