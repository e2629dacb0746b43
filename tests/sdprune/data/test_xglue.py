"""XGLUE from a folder of the same configurations, splits and columns."""

import math

import pytest

from sdprune.data import tasks, xglue
from sdprune.data.metrics import compute
from sdprune.data.tasks import load_task
from sdprune.data.xglue import XGLUE, load_xglue
from sdprune.recipe import DataConfig


@pytest.fixture(scope="module")
def repository(tmp_path_factory):
    """Twelve rows a split; labels as numbers, as the hub stores classes, but for names in QAM and NER."""
    import datasets
    import pandas

    folder = tmp_path_factory.mktemp("xglue")
    card = ["---", "configs:"]
    for name, task in XGLUE.items():
        card += [f"- config_name: {name}", "  data_files:"]
        for split in ("train", "validation.en", "test.en", *(f"test.{language}" for language in task.languages)):
            columns = {c: [f"{split} {c} {row}" for row in range(12)] for pair in task.text_columns for c in pair}
            labels = [row % len(task.label_names) for row in range(12)]
            columns[task.label_column] = [task.label_names[label] for label in labels] if name == "qam" else labels
            if task.tagged:
                columns["words"] = [text.split() for text in columns["words"]]
                tags = [task.label_names[label] if name == "ner" else label for label in labels]
                columns[task.label_column] = [[tag, tags[0], tags[1]] for tag in tags]
            (folder / name).mkdir(exist_ok=True)
            pandas.DataFrame(columns).to_parquet(folder / name / f"{split}.parquet")
            card += [f"  - split: {split}", f"    path: {name}/{split}.parquet"]
    (folder / "README.md").write_text("\n".join([*card, "---", ""]))
    before = datasets.config.HF_DATASETS_CACHE
    datasets.config.HF_DATASETS_CACHE = folder / "cache"
    datasets.disable_progress_bars()
    yield str(folder)
    datasets.config.HF_DATASETS_CACHE = before
    datasets.enable_progress_bars()


@pytest.mark.parametrize("name", XGLUE)
def test_english_is_trained_on_and_every_language_tested(name, repository, monkeypatch):
    monkeypatch.setattr(tasks, "load_xglue", lambda name: load_xglue(name, repository, None))
    task = load_task(DataConfig(data=name, max_eval_samples=8))
    stored = XGLUE[name]
    assert (len(task.train), len(task.validation), len(task.test)) == (12, 8, 8)
    assert tuple(task.zero_shot) == stored.languages
    assert {len(rows) for rows in task.zero_shot.values()} == {8}
    labels = [row % len(stored.label_names) for row in range(12)]
    if stored.tagged:
        assert task.train.texts[3] == ("train", "words", "3")
        assert task.train.labels == tuple((label, 0, 1) for label in labels)
    else:
        assert task.train.texts[3] == tuple(
            " ".join(f"train {column} 3" for column in columns) for columns in stored.text_columns
        )
        assert task.train.labels == tuple(labels)
    assert task.zero_shot["de"].texts[0][0].startswith("test.de")
    assert task.metrics[0] == {"wpr": "ndcg", "ner": "span_f1"}.get(name, "accuracy")


def test_wrong_labels_are_named(repository):
    with pytest.raises(ValueError, match="row 3: label is 7, none of different, same"):
        xglue._examples({"sentence1": ["a"] * 3, "sentence2": ["b"] * 3, "label": [0, 1, 7]}, XGLUE["paws-x"], "train")
    with pytest.raises(ValueError, match="row 2: ner is 'B-DATE', none of O, B-PER"):
        xglue._examples({"words": [["a"], ["b", "c"]], "ner": [["O"], ["O", "B-DATE"]]}, XGLUE["ner"], "train")


def test_out_of_reach(tmp_path):
    with pytest.raises(OSError, match=r"XGLUE task 'nc' could not be loaded from .*--data FILE"):
        load_xglue("nc", str(tmp_path / "absent"), None)


def test_ndcg_against_its_definition():
    labels, queries = [0, 2, 1, 3, 0, 0, 4], ["a", "a", "a", "b", "b", "b", "alone"]
    logits = [[3, 0, 0, 0, 0], [0, 3, 0, 0, 0], [0, 0, 3, 0, 0], [0, 0, 0, 0, 3], [3, 0, 0, 0, 0]]
    logits += [[0, 3, 0, 0, 0], [3, 0, 0, 0, 0]]
    ranked = (1 + 3 / math.log2(3)) / (3 + 1 / math.log2(3))  # the first query puts label 1 above label 2
    found = compute(["ndcg"], logits, labels, queries)["ndcg"]
    assert found == pytest.approx((ranked + 1) / 2)
    with pytest.raises(ValueError, match="needs one query a row"):
        compute(["ndcg"], logits, labels)
