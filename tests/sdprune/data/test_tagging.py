"""Words with a tag each: out of files, through the tokenizer, and scored by their spans."""

import json

import numpy as np
import pytest
from transformers import DataCollatorForTokenClassification

from sdprune.data.examples import Examples, encode
from sdprune.data.metrics import compute, is_span_scheme, spans
from sdprune.data.tasks import load_task
from sdprune.recipe import DataConfig

NAMES = ("B-LOC", "B-PER", "I-PER", "O")


def make_rows(count=40):
    rows = [
        {"tokens": ["great", "film"], "tags": ["O", "B-LOC"]},
        {"tokens": ["the", "dull", "plot"], "tags": ["B-PER", "I-PER", "O"]},
    ]
    return [rows[row % 2] for row in range(count)]


def write(path, rows):
    if path.suffix == ".parquet":
        import pandas

        pandas.DataFrame(rows).to_parquet(path)
    else:
        path.write_text("\n".join(map(json.dumps, rows)) + "\n")
    return str(path)


def load(path, rows, **options):
    return load_task(DataConfig(data=write(path, rows), text_column="tokens", label_column="tags", **options))


@pytest.mark.parametrize("suffix", ["jsonl", "parquet"])
def test_files_of_words_and_tags(suffix, tmp_path):
    task = load(tmp_path / f"data.{suffix}", make_rows(), max_train_samples=20)
    assert task.tagged
    assert (task.label_names, task.num_labels, task.metrics) == (NAMES, 4, ("span_f1", "accuracy"))
    assert (len(task.train), len(task.validation), len(task.test)) == (20, 3, 10)
    tags = {words: labels for words, labels in zip(task.train.texts, task.train.labels, strict=True)}
    assert tags == {("great", "film"): (3, 0), ("the", "dull", "plot"): (1, 2, 3)}


def test_tags_that_mark_no_spans(tmp_path):
    rows = [{"tokens": ["a", "b"], "tags": tags} for tags in (["DET", "NOUN"], ["X", "DET"])] * 5
    assert load(tmp_path / "data.jsonl", rows).metrics == ("accuracy", "macro_f1")
    numbers = load(tmp_path / "numbers.jsonl", [row | {"tags": [10, 9]} for row in rows])
    assert numbers.label_names == ("9", "10")
    assert numbers.train.labels[0] == (1, 0)


@pytest.mark.parametrize(
    ("cells", "options", "message"),
    [
        ({"tags": ["O"]}, {}, "row 3 has 2 words in column 'tokens', but 1 tags in column 'tags'"),
        ({"tags": "O"}, {}, "row 3 has no list of tags in column 'tags'"),
        ({"tags": ["O", None]}, {}, "row 3 has no list of tags"),
        ({"tags": ["O", 0.5]}, {}, "row 3 has no list of tags"),
        ({"tokens": "great film"}, {}, "row 3 has no list of words in column 'tokens'"),
        ({"tokens": ["great", ""]}, {}, "row 3 has no list of words"),
        ({"tokens": [], "tags": []}, {}, "row 3 has no list of words"),
        ({}, {"text_pair_column": "tags"}, "holds lists of words, which have no text_pair_column"),
    ],
)
def test_bad_rows(cells, options, message, tmp_path):
    rows = make_rows()
    rows[2] = rows[2] | cells
    with pytest.raises(ValueError, match=message):
        load(tmp_path / "data.jsonl", rows, **options)


def test_a_test_file_of_another_kind(tmp_path):
    other = write(tmp_path / "test.jsonl", [{"tokens": "great film", "tags": "O"}] * 9)
    with pytest.raises(ValueError, match=r"test\.jsonl holds text in column 'tokens', but .*data\.jsonl holds lists"):
        load(tmp_path / "data.jsonl", make_rows(), test_data=other)
    other = write(tmp_path / "test.jsonl", [{"tokens": ["film"], "tags": ["B-DATE"]}])
    with pytest.raises(ValueError, match="row 1: the training rows never have the label 'B-DATE', only 'B-LOC'"):
        load(tmp_path / "data.jsonl", make_rows(), test_data=other)


def test_rows_are_checked():
    with pytest.raises(ValueError, match=r"texts\[1\] holds 2 words, but its labels are \(0,\)"):
        Examples((("a",), ("a", "b")), ((0,), (0,)))
    rows = Examples((("a",), ("a", "b")), ((1,), (0, 1)))
    assert rows.renumbered([2, 0]) == Examples(rows.texts, ((0,), (2, 0)))
    assert rows.select([1]).tagged


def test_the_first_piece_of_a_word_has_its_label(tokenizer):
    """Words that the tokenizer splits, drops or cuts off."""
    rows = Examples((("great-film", "\u200b", "the", "plot"), ("dull",)), ((1, 3, 2, 3), (0,)))
    encoded = encode(rows, tokenizer, 7)
    assert tokenizer.decode(encoded[0]["input_ids"]) == "[CLS] great [UNK] film the plot [SEP]"
    assert encoded[0]["labels"] == [-100, 1, -100, -100, 2, 3, -100]
    assert encode(rows, tokenizer, 6)[0]["labels"] == [-100, 1, -100, -100, 2, -100]
    batch = DataCollatorForTokenClassification(tokenizer)([encoded[0], encoded[1]])
    assert batch["labels"][1].tolist() == [-100, 0, -100, -100, -100, -100, -100]


def test_a_slow_tokenizer_is_refused(tokenizer):
    class Slow:
        is_fast = False

    with pytest.raises(ValueError, match=r"need a fast tokenizer, .* got the slow Slow"):
        encode(Examples((("a",),), ((0,),)), Slow(), 8)


@pytest.mark.parametrize(
    ("tags", "expected"),
    [
        ("B-A I-A O B-B", [("A", 0, 2), ("B", 3, 4)]),
        ("I-A I-A I-B O I-B", [("A", 0, 2), ("B", 2, 3), ("B", 4, 5)]),  # IOB1, as in the first CoNLL data
        ("B-A B-A I-A", [("A", 0, 1), ("A", 1, 3)]),
        ("S-A B-B E-B S-B I-B", [("A", 0, 1), ("B", 1, 3), ("B", 3, 4), ("B", 4, 5)]),
        ("E-A E-A O", [("A", 0, 1), ("A", 1, 2)]),
        ("B-A I-B B-B-C", [("A", 0, 1), ("B", 1, 2), ("B-C", 2, 3)]),
        ("O O", []),
        ("", []),
    ],
)
def test_spans(tags, expected):
    assert list(spans(tags.split())) == expected


def test_span_schemes():
    assert is_span_scheme(("O", "B-PER", "I-PER"))
    assert not is_span_scheme(("O",))
    assert not is_span_scheme(("ADJ", "NOUN"))
    assert not is_span_scheme(("B-", "O"))


def test_scores_by_hand():
    labels = np.array([[-100, 1, 2, 3, 0], [-100, 0, -100, -100, -100]])
    right = np.eye(4)[np.where(labels < 0, 1, labels)]
    perfect = compute(("span_f1", "accuracy"), right, labels, label_names=NAMES)
    assert perfect == {"span_f1": 1.0, "accuracy": 1.0}
    wrong = right.copy()
    wrong[0, 2] = np.eye(4)[3]  # the first of three spans ends too early
    scores = compute(("accuracy", "span_f1", "macro_f1"), wrong, labels, label_names=NAMES)
    assert list(scores) == ["accuracy", "span_f1", "macro_f1"]
    assert scores["accuracy"] == pytest.approx(4 / 5)
    assert scores["span_f1"] == pytest.approx(2 / 3)
    assert scores["macro_f1"] == pytest.approx((1 + 1 + 0 + 2 / 3) / 4)
    assert compute(("span_f1",), np.eye(4)[[[3]]], [[3]], label_names=NAMES) == {"span_f1": 0.0}


def test_what_cannot_be_scored():
    with pytest.raises(ValueError, match=r"'span_f1' needs labels .* such as .* got \(2,\) and none"):
        compute(("span_f1",), np.eye(2), [0, 1])
    with pytest.raises(ValueError, match="no token has a label"):
        compute(("accuracy",), np.zeros((1, 2, 3)), [[-100, -100]])
    with pytest.raises(ValueError, match="must have the same rows"):
        compute(("accuracy",), np.zeros((1, 2, 3)), [[0, 1, 1]])
