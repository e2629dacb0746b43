"""Every recipe of the package runs to its end, on a tiny model and few steps, by its name alone."""

import importlib.util
import json
import re

import pytest
import torch
import yaml
from transformers import AutoModelForSequenceClassification

from sdprune.cli import main
from sdprune.recipe import RECIPES, Recipe, recipe_names

FAST = ["--max-steps", "8", "--per-device-train-batch-size", "8", "--eval-steps", "8", "--save-steps", "8"]
FAST += ["--bf16", "false", "--warmup-steps", "0", "--logging-steps", "2", "--max-eval-samples", "16"]
FAST += ["--retraining-steps", "3", "--student-width-multiple", "8"]
QUANTIZED = ("pqk", "prune-quantize-distill")


@pytest.fixture
def call(model_folder, csv_file, tmp_path, in_process):
    """Return a call of `sdprune prune --recipe NAME`; a fresh process for each model would take most of the time."""

    def run(name, *options):
        one_shot = Recipe.read_values(Recipe.find(name))["schedule"] == "one_shot"
        steps = ("--pruning-steps", "1" if one_shot else "2", "--start-ratio", "0.25", "--end-ratio", "0.75")
        options = (*steps, *options)
        start = ["prune", "--recipe", name, "--model", str(model_folder), "--data", str(csv_file)]
        return main([*start, "--output", str(tmp_path / "run"), *FAST, *options])

    return run


def test_the_package_has_its_recipes():
    names = "awr-cosine awr-frobenius epsd gmp-star lamp movement pqk prune-quantize-distill prune-then-distill"
    assert recipe_names() == (*names.split(), "sdp-cc", "sdp-cc-kld", "sdp-cos", "sdp-kld", "soft-movement")


@pytest.mark.parametrize("name", recipe_names())
def test_recipes_are_flat_and_say_where_they_come_from(name):
    text = (RECIPES / f"{name}.yaml").read_text()
    assert text.startswith("# ")
    assert "https://" in text.split("\ntarget_sparsity")[0]
    recipe = Recipe.from_dict({"model": "any", **yaml.safe_load(text)})
    assert 0.5 <= recipe.pruning.target_sparsity <= 0.9


@pytest.mark.parametrize("name", [name for name in recipe_names() if name not in QUANTIZED])
def test_recipe_runs(call, tmp_path, name, capsys):
    assert call(name) == 0, capsys.readouterr().err
    wanted = Recipe.read_values(RECIPES / f"{name}.yaml")
    rows = json.loads((tmp_path / "run" / "metrics.json").read_text())["runs"]
    assert rows[0]["sparsity"] == pytest.approx(wanted["target_sparsity"], abs=2e-3)
    assert (tmp_path / "run" / "report.html").exists()
    model = AutoModelForSequenceClassification.from_pretrained(tmp_path / "run" / "model")
    if name == "prune-then-distill":
        assert [row["method"] for row in rows] == ["pruned teacher", "prune, then distil"]
        assert model.config.intermediate_size < 64
        assert rows[1]["sparsity"] == 0.0


def test_an_interrupted_pipeline_goes_on(call, tmp_path, monkeypatch, capsys):
    """Between its stages as well, by the command that the interruption names."""
    from sdprune.runs import prune_then_distill as module

    make_student = module.make_student

    def interrupted(*args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr(module, "make_student", interrupted)
    assert call("prune-then-distill") == 130
    monkeypatch.setattr(module, "make_student", make_student)
    teacher = tmp_path / "run" / "teacher" / "stage.json"
    written = teacher.stat().st_mtime_ns
    assert call("prune-then-distill") == 2
    assert "already holds a run" in capsys.readouterr().err
    assert main(["prune", "--resume", str(tmp_path / "run")]) == 0
    assert teacher.stat().st_mtime_ns == written
    assert (tmp_path / "run" / "model" / "model.safetensors").exists()


@pytest.mark.skipif(importlib.util.find_spec("torchao") is None, reason="needs torchao (the extra quantize)")
@pytest.mark.parametrize("name", QUANTIZED)
def test_quantized_recipe_runs(call, tmp_path, name, capsys):
    assert call(name) == 0, capsys.readouterr().err
    (row,) = json.loads((tmp_path / "run" / "metrics.json").read_text())["runs"]
    assert row["sparsity"] == pytest.approx(0.7, abs=2e-3)
    assert set(row["int8"]) == {"accuracy", "macro_f1"}
    stages = {path.parent.name for path in (tmp_path / "run").glob("*/stage.json")}
    last = {"pqk": "student", "prune-quantize-distill": "distilled"}[name]
    assert stages == {"pruned", last, {"pqk": "teacher"}.get(name, "quantized")}
    weights = [
        AutoModelForSequenceClassification.from_pretrained(tmp_path / "run" / folder / "model").state_dict()
        for folder in ("pruned", last)
    ]
    name = "bert.encoder.layer.1.output.dense.weight"
    zeros = [weight[name] == 0 for weight in weights]
    assert torch.equal(*zeros)  # the later stages kept them
    assert not torch.equal(weights[0][name], weights[1][name])


@pytest.mark.parametrize("name", QUANTIZED)
def test_without_torchao(call, tmp_path, monkeypatch, name, capsys):
    monkeypatch.setitem(__import__("sys").modules, "torchao.quantization.qat", None)
    assert call(name, "--target-sparsity", "0.5") == 1
    assert re.search(r"needs torchao .*pip install 'sdprune\[quantize\]'", capsys.readouterr().err)
    assert not (tmp_path / "run").exists()


def test_the_help_names_the_recipes_whole(monkeypatch, capsys):
    monkeypatch.setenv("COLUMNS", "70")
    with pytest.raises(SystemExit):
        main(["prune", "--help"])
    text = capsys.readouterr().out
    assert all(re.search(rf"[ \n]{name}[,.]", text) for name in recipe_names())
    assert text.index("Prune a model") < 250  # not behind a screen of all the options


def test_unknown_names_are_answered_with_the_nearest(capsys):
    assert main(["prune", "--recipe", "sdp_cc", "--output", "unused"]) == 2
    error = capsys.readouterr().err
    assert "recipe 'sdp_cc' is neither a file nor a name; did you mean 'sdp-cc'? Recipes: awr-cosine, " in error
    assert main(["prune", "--recipe", "zzzz", "--output", "unused"]) == 2
    assert "neither a file nor a name. Recipes: " in capsys.readouterr().err
    assert main(["prune", "--recipe", "missing.yaml", "--output", "unused"]) == 2
    assert "'missing.yaml' is not a file" in capsys.readouterr().err
