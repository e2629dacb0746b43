"""A recipe may name another teacher than the model itself."""

import json

import pytest

from sdprune.cli import main

FAST = ["--max-steps", "4", "--per-device-train-batch-size", "8", "--pruning-steps", "2", "--eval-steps", "4"]
FAST += ["--bf16", "false", "--warmup-steps", "0", "--logging-steps", "1", "--distillation", "mse"]
FAST += ["--representation", "logits"]


@pytest.fixture
def call(model_folder, csv_file, tmp_path, in_process):

    def run(output, *options):
        start = ["prune", "--model", str(model_folder), "--data", str(csv_file), "--output", str(tmp_path / output)]
        return main([*start, *FAST, *options])

    return run


@pytest.fixture
def save(model_factory, tokenizer, tmp_path):
    def make(name, **changes):
        model_factory(seed=5, **changes).save_pretrained(tmp_path / name)
        tokenizer.save_pretrained(tmp_path / name)
        return str(tmp_path / name)

    return make


def test_the_named_teacher_teaches(call, save, tmp_path):
    """At its first step the model is its own copy, from which it differs in nothing but dropout."""
    assert call("own") == 0
    assert call("other", "--teacher-model", save("wide", hidden_size=64)) == 0
    first = {}
    for run in ("own", "other"):
        rows = [json.loads(line) for line in (tmp_path / run / "metrics.jsonl").read_text().splitlines()]
        first[run] = next(row["loss_mse"] for row in rows if "loss_mse" in row)
    assert first["other"] > 1.5 * first["own"]


def test_teachers_that_do_not_fit_are_refused(call, save, model_factory, tokenizer, tmp_path, capsys):
    swapped = save("swapped", id2label={0: "good", 1: "bad"}, label2id={"good": 0, "bad": 1})
    model_factory().bert.save_pretrained(tmp_path / "body")
    tokenizer.save_pretrained(tmp_path / "body")
    for options, message in (
        (["--teacher-model", swapped], "has the classes good, bad, the model bad, good; both need the same"),
        (["--teacher-model", str(tmp_path / "body")], "has no trained classification head"),
        (["--teacher-model", swapped, "--distillation", "none"], "teaches nothing: distillation is None"),
        (["--teacher-model", swapped, "--pipeline", "pqk"], "belongs to pipeline='prune'; 'pqk' makes its own"),
        (["--teacher-model", save("three", num_labels=3)], "has 3 classes, but the labels of"),
    ):
        assert call("run", *options) == 2
        assert message in " ".join(capsys.readouterr().err.split())
        assert not (tmp_path / "run").exists()
