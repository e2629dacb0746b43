"""The command line: what it does, and one line for everything a person can get wrong."""

import importlib.metadata
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time

import pytest
import torch
from transformers import AutoModelForSequenceClassification

import sdprune
from sdprune.cli import main
from sdprune.config import SDPruneConfig
from sdprune.recipe import DataConfig, Recipe, TrainingConfig

FAST = ["--max-steps", "8", "--per-device-train-batch-size", "8", "--pruning-steps", "4", "--eval-steps", "4"]
FAST += ["--save-steps", "4", "--bf16", "false", "--warmup-steps", "0", "--logging-steps", "2"]


@pytest.fixture
def prune(model_folder, csv_file, tmp_path, unopposed):
    """Return a call of `sdprune prune` on a tiny model and file."""

    def call(*options, model=model_folder, data=csv_file, output=tmp_path / "run"):
        return main(["prune", "--model", str(model), "--data", str(data), "--output", str(output), *FAST, *options])

    return call


def test_prune_evaluate_export(prune, csv_file, tmp_path, capsys):
    assert prune("--target-sparsity", "0.75") == 0
    run = tmp_path / "run"
    names = {path.name for path in run.iterdir()}
    assert {"recipe.yaml", "sdprune_config.json", "metrics.jsonl", "metrics.json", "model", "report.html"} <= names
    assert {"checkpoint-4", "checkpoint-8"} <= names
    metrics = json.loads((run / "metrics.json").read_text())
    (row,) = metrics["runs"]
    assert row["sparsity"] == row["target_sparsity"] == 0.75
    assert 0 < row["model_sparsity"] < row["sparsity"]
    assert row["reload_max_difference"] == 0.0
    assert row["speedup"] > 0
    assert set(metrics["dense"]) == {"accuracy", "macro_f1"}
    output, bar = capsys.readouterr()
    assert "sparsity=75.0%" in bar
    assert "cross_correlation=" in bar
    assert "8/8" in bar
    assert "SDP-CC" in output
    assert "Zeros alone do not speed up a dense product" in output

    assert main(["prune", "--resume", str(run)]) == 2
    assert "is finished" in capsys.readouterr().err
    assert main(["evaluate", str(run / "model"), "--data", str(csv_file)]) == 0
    output = capsys.readouterr().out
    assert f"accuracy         {row['accuracy']:.4f}" in output
    assert "0.7500 of the linear layers" in output

    assert main(["export", str(run), "--output", str(tmp_path / "exported")]) == 0
    exported, trained = (
        AutoModelForSequenceClassification.from_pretrained(path).state_dict()
        for path in (tmp_path / "exported", run / "model")
    )
    assert all(torch.equal(value, trained[name]) for name, value in exported.items())


def test_version(capsys):
    with pytest.raises(SystemExit) as ended:
        main(["--version"])
    assert ended.value.code == 0
    lines = capsys.readouterr().out.splitlines()
    names = ["sdprune", "Python", "torch", "triton", "transformers", "platform", "device"]
    assert [line.split()[0] for line in lines] == names
    assert lines[0] == f"sdprune {sdprune.__version__}" == f"sdprune {importlib.metadata.version('sdprune')}"
    assert lines[2] == f"torch {torch.__version__}"
    assert torch.cuda.is_available() or lines[-1] in ("device cpu", "device mps")


def test_version_without_triton(capsys, monkeypatch):
    def absent(name):
        if name == "triton":
            raise importlib.metadata.PackageNotFoundError(name)
        return "1.0"

    monkeypatch.setattr(importlib.metadata, "version", absent)
    with pytest.raises(SystemExit):
        main(["--version"])
    assert "\ntriton is not installed\ntransformers 1.0\n" in capsys.readouterr().out


def test_options_override_the_recipe(prune, model_folder, csv_file, tmp_path):
    training = TrainingConfig(max_steps=8, per_device_train_batch_size=8, bf16=False)
    pruning = SDPruneConfig(
        target_sparsity=0.25, pruning_steps=2, distillation="kl", structure="block", block_shape=(8, 8)
    )
    recipe = Recipe(str(model_folder), DataConfig(data=str(csv_file)), training, pruning)
    recipe.save(tmp_path / "recipe.yaml")
    options = ["--target-sparsity", "0.5", "--block-shape", "16x8"]
    options += ["--distillation", "{cross_correlation@first: 1, mse@logits: 0.5}"]
    assert main(["prune", "--recipe", str(tmp_path / "recipe.yaml"), "--output", str(tmp_path / "run"), *options]) == 0
    saved = Recipe.from_dict(Recipe.read_values(tmp_path / "run" / "recipe.yaml"))
    assert saved.training == training
    assert saved.pruning == SDPruneConfig(
        target_sparsity=0.5,
        pruning_steps=2,
        distillation={"cross_correlation@first": 1.0, "mse@logits": 0.5},
        structure="block",
        block_shape=(16, 8),
    )
    (row,) = json.loads((tmp_path / "run" / "metrics.json").read_text())["runs"]
    assert row["method"] == "SDP-CC (first) + MSE (logits)"


@pytest.mark.parametrize(("value", "got"), [("mse@nowhere", "'nowhere'"), ("{kl@first: 1}", "'first'")])
def test_a_term_that_cannot_be_compared(prune, tmp_path, capsys, value, got):
    assert prune("--distillation", value) == 2
    (line,) = capsys.readouterr().err.strip().splitlines()[-1:]
    assert line.startswith(f"sdprune: error: distillation '{value.strip('{}').split(':')[0]}': ")
    assert f"got {got}" in line
    assert not (tmp_path / "run").exists()


def test_a_model_without_a_head_is_fine_tuned_first(prune, model_factory, tokenizer, tmp_path, capsys):
    model_factory().bert.save_pretrained(tmp_path / "body")
    tokenizer.save_pretrained(tmp_path / "body")
    assert prune(model=tmp_path / "body") == 2
    assert "has no trained classification head; fine-tune it first" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()
    fine_tune = ("--target-sparsity", "0", "--distillation", "none", "--pruning-steps", "16")
    assert prune(*fine_tune, model=tmp_path / "body") == 0
    config = json.loads((tmp_path / "run" / "model" / "config.json").read_text())
    assert config["label2id"] == {"bad": 0, "good": 1}


def edit(path, old, new):
    path.write_text(path.read_text().replace(old, new))
    return path


WRONG_DATA = {
    "missing": (lambda path: path.unlink() or path, "does not exist|no such file|neither"),
    "column": (lambda path: edit(path, "text,label", "texts,label"), r"column.*'text'.*texts"),
    "empty text": (
        lambda path: edit(path, "text,label\n", "text,label\n,good\n"),
        "row 1 has no text in column 'text'",
    ),
    "one class": (lambda path: edit(path, ",bad", ",good"), "holds a single class, 'good'"),
    "classes": (lambda path: edit(path, "text,label\n", "text,label\n" + "a film,fine\n" * 20), "has 2 classes"),
}


@pytest.mark.parametrize("case", WRONG_DATA)
def test_wrong_data(prune, csv_file, tmp_path, capsys, case):
    spoil, message = WRONG_DATA[case]
    path = spoil(shutil.copy(csv_file, tmp_path / "own.csv"))
    assert_refused(prune(data=path), capsys, message, tmp_path)


def assert_refused(code, capsys, message, tmp_path):
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert code == 2, error
    assert error.startswith("sdprune: error: ")
    assert re.search(message, error), error
    assert not (tmp_path / "run").exists() or not list((tmp_path / "run").iterdir())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--target-sparsity", "1.0"], r"target_sparsity must lie in \[0, 1\), got 1.0"),
        (["--structure", "block", "--block-shape", "24x8"], r"block_shape \(24, 8\).*does not divide layer 'bert"),
        (["--pruning-steps", "9"], "pruning_steps=9 do not fit: the training has 8 steps"),
        (["--target-modules", "nothing"], "'nothing' matches no linear layer.*Linear layers of this model: bert"),
    ],
    ids=lambda value: value[1] if isinstance(value, list) else "",
)
def test_wrong_options(prune, tmp_path, capsys, options, message):
    assert_refused(prune(*options), capsys, message, tmp_path)


def test_wrong_model_folders(prune, model_folder, tmp_path, capsys):
    shutil.copytree(model_folder, tmp_path / "empty")
    (tmp_path / "empty" / "model.safetensors").unlink()
    assert_refused(
        prune(model=tmp_path / "empty"),
        capsys,
        r"has no weights \(\*\.safetensors\)",
        tmp_path,
    )
    assert_refused(prune(model=tmp_path / "absent"), capsys, "is not a folder", tmp_path)


def test_wrong_recipes(model_folder, tmp_path, capsys):
    path = tmp_path / "recipe.yaml"
    path.write_text(f"model: {model_folder}\ntarget_sparcity: 0.5\n")
    code = main(["prune", "--recipe", str(path), "--output", str(tmp_path / "run")])
    assert_refused(code, capsys, "unknown key 'target_sparcity'; did you mean 'target_sparsity'", tmp_path)
    assert_refused(main(["prune", "--output", str(tmp_path / "run")]), capsys, "--model is missing", tmp_path)
    assert_refused(main(["prune", "--model", "m"]), capsys, "--output is missing", tmp_path)
    assert_refused(main(["prune", "--resume", str(tmp_path / "run")]), capsys, "holds no run", tmp_path)
    code = main(["prune", "--resume", str(tmp_path), "--seed", "1"])
    assert_refused(code, capsys, "--resume goes alone", tmp_path)


def test_an_output_that_holds_another_run(prune, tmp_path, capsys):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "thesis.txt").write_text("mine")
    assert prune() == 2
    assert "is not an empty folder; name another one or remove it" in capsys.readouterr().err
    (tmp_path / "run" / "sdprune_config.json").write_text("{}")
    assert prune() == 2
    assert "already holds a run" in capsys.readouterr().err
    assert (tmp_path / "run" / "thesis.txt").read_text() == "mine"


def test_a_run_interrupted_after_its_training_goes_on(prune, tmp_path, monkeypatch, capsys):
    def stop(*arguments, **options):
        raise KeyboardInterrupt

    with monkeypatch.context() as context:
        context.setattr("sdprune.runs.results.fresh_logits", stop)
        assert prune() == 130
    assert (tmp_path / "run" / "model").exists()
    assert not (tmp_path / "run" / "metrics.json").exists()
    assert main(["prune", "--resume", str(tmp_path / "run")]) == 0
    assert (tmp_path / "run" / "metrics.json").exists()


@pytest.mark.parametrize("option", [["--distillation", "{kl:1"], ["--target-sparsity", "["]], ids=str)
def test_malformed_values(prune, tmp_path, capsys, option):
    with pytest.raises(SystemExit) as exit_:
        prune(*option)
    assert exit_.value.code == 2
    assert "invalid" in capsys.readouterr().err


def test_a_model_that_is_nowhere(prune, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    assert prune(model="nobody/nothing") == 1
    (line,) = capsys.readouterr().err.strip().splitlines()[-1:]
    assert line.startswith("sdprune: error: cannot load model 'nobody/nothing'")
    assert not (tmp_path / "run").exists()


def command(*arguments):
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    return [sys.executable, "-m", "sdprune.cli", *arguments], environment


def test_ctrl_c_and_resume(model_folder, csv_file, tmp_path):
    run = tmp_path / "run"
    options = ["--model", str(model_folder), "--data", str(csv_file), "--output", str(run), *FAST]
    options[options.index("--max-steps") + 1] = "400"
    arguments, environment = command("prune", *options, "--save-steps", "1000")
    process = subprocess.Popen(arguments, env=environment, stderr=subprocess.PIPE, text=True)
    deadline = time.time() + 120
    while not (run / "metrics.jsonl").exists() or not (run / "metrics.jsonl").read_text():
        assert time.time() < deadline
        assert process.poll() is None, process.stderr.read()
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    _, error = process.communicate(timeout=60)
    assert process.returncode == 130, error
    assert error.strip().splitlines()[-1] == f"Go on with: sdprune prune --resume {run}"
    assert not (run / "model").exists()
    arguments, environment = command("prune", "--resume", str(run))
    again = subprocess.run(arguments, env=environment, capture_output=True, text=True, check=False, timeout=120)
    assert again.returncode == 0, again.stderr
    steps = [row["step"] for row in map(json.loads, (run / "metrics.jsonl").read_text().splitlines()) if "loss" in row]
    assert steps == list(range(2, 402, 2))


def test_a_full_disk(model_folder, csv_file, tmp_path):
    """A limit on the size of files stands in for the disk; nothing half-written is taken for whole."""
    run = tmp_path / "run"
    options = ["--model", str(model_folder), "--data", str(csv_file), "--output", str(run), *FAST]
    script = (
        "import resource, signal, sys; signal.signal(signal.SIGXFSZ, signal.SIG_IGN); "
        "resource.setrlimit(resource.RLIMIT_FSIZE, (40_000, 40_000)); "
        "from sdprune.cli import main; sys.exit(main(sys.argv[1:]))"
    )
    process = subprocess.run(
        [sys.executable, "-c", script, "prune", *options], capture_output=True, text=True, check=False, timeout=120
    )
    assert process.returncode == 1, process.stderr
    last = process.stderr.strip().splitlines()[-1]
    assert last.startswith("sdprune: error: ")
    assert last.endswith(
        "Free some space; a run goes on from its last whole checkpoint with: sdprune prune --resume OUTPUT"
    )
    assert not list(run.glob("checkpoint-*"))
    assert not (run / "model").exists()


@pytest.mark.parametrize("arguments", [["--help"], ["prune", "--help"], ["demo", "--help"], ["evaluate", "--help"]])
def test_help_names_every_option(arguments, capsys):
    with pytest.raises(SystemExit) as exit_:
        main(arguments)
    assert exit_.value.code == 0
    text = capsys.readouterr().out
    if arguments[0] == "prune":
        for kind in (DataConfig, TrainingConfig, SDPruneConfig):
            for name in kind.field_names():
                assert f"--{name.replace('_', '-')}" in text
    assert "sdprune" in text


def test_help_without_docstrings():
    """`python -OO` drops the docstrings that the help of the options is made of: they are read from the source."""
    code = (
        "from sdprune.cli import COMMANDS, main\n"
        "for name in ('', *(module.__name__.rpartition('.')[2] for module in COMMANDS)):\n"
        "    try:\n        main([*name.split(), '--help'])\n"
        "    except SystemExit as stop:\n        print(name, 'ended with', stop.code)\n"
    )
    process = subprocess.run([sys.executable, "-OO", "-c", code], capture_output=True, text=True, check=False)
    assert process.returncode == 0, process.stderr
    for name in ("", "demo", "prune", "evaluate", "export", "inspect", "benchmark"):
        assert f"{name} ended with 0" in process.stdout
    assert "optimizer steps until the peak learning rate (default: 20)" in " ".join(process.stdout.split())
