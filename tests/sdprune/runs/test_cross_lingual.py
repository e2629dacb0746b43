"""Trained on one language, every other one reported apart."""

import json
from dataclasses import replace

import pytest

from sdprune.cli import main
from sdprune.data.tasks import load_task
from sdprune.recipe import DataConfig
from sdprune.runs import workbench


@pytest.fixture
def foreign(csv_file, monkeypatch):
    """Give the task of the CSV file test rows in two languages, the second one with all labels wrong."""

    def load(config, cache=None, **options):
        task = load_task(config, cache=cache, **options)
        wrong = replace(task.test, labels=tuple(1 - label for label in task.test.labels))
        return replace(task, zero_shot={"fr": task.test, "xx": wrong})

    monkeypatch.setattr(workbench, "load_task", load)
    return load


def test_languages_are_reported_apart(foreign, model_folder, csv_file, tmp_path, capsys, in_process):
    start = ["prune", "--recipe", "sdp-kld", "--model", str(model_folder), "--data", str(csv_file), "--max-steps", "4"]
    steps = ["--pruning-steps", "2", "--bf16", "false", "--warmup-steps", "0", "--eval-steps", "4"]
    assert main([*start, *steps, "--output", str(tmp_path / "run")]) == 0
    metrics = json.loads((tmp_path / "run" / "metrics.json").read_text())
    (row,) = metrics["runs"]
    for scores, languages in ((metrics["dense"], metrics["dense_languages"]), (row, row["languages"])):
        assert languages["fr"]["accuracy"] == scores["accuracy"]
        assert languages["xx"]["accuracy"] == pytest.approx(1.0 - scores["accuracy"])
    assert "accuracy, zero-shot" in capsys.readouterr().out
    assert main(["evaluate", str(tmp_path / "run" / "model"), "--data", str(csv_file)]) == 0
    scores = row["languages"]["xx"]
    line = f"xx               accuracy {scores['accuracy']:.4f}, macro_f1 {scores['macro_f1']:.4f}\n"
    assert line in capsys.readouterr().out


def test_labels_take_the_order_of_the_model_in_every_language(foreign, model_factory, tokenizer, csv_file, tmp_path):
    model = model_factory(id2label={0: "good", 1: "bad"}, label2id={"good": 0, "bad": 1})
    model.save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    data = DataConfig(data=str(csv_file))
    task = workbench.load_workbench(str(tmp_path / "model"), data).task
    before = foreign(data)
    assert task.label_names == ("good", "bad")
    assert task.test.labels == task.zero_shot["fr"].labels == before.zero_shot["xx"].labels
    assert task.zero_shot["xx"].labels == before.test.labels
