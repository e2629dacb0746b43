"""How a model is read and written: its dtype, the code that it brings along, and no path of anybody."""

import json
import sys

import pytest
import torch
from safetensors import safe_open

import sdprune
from sdprune.cli import main
from sdprune.data.examples import Examples
from sdprune.data.tasks import Task
from sdprune.runs.classifier import load_classifier

FAST = ["--max-steps", "4", "--per-device-train-batch-size", "8", "--eval-steps", "8", "--bf16", "false"]
FAST += ["--warmup-steps", "0", "--pruning-steps", "2", "--seed", "1"]
CONFIGURATION = """
from transformers import BertConfig


class OwnConfig(BertConfig):
    model_type = "own-bert"
"""
MODELING = """
from transformers import BertForSequenceClassification

from .configuration_own import OwnConfig


class OwnForSequenceClassification(BertForSequenceClassification):
    config_class = OwnConfig

    def forward(self, input_ids=None, attention_mask=None, token_type_ids=None, labels=None, **options):
        outputs = super().forward(input_ids, attention_mask, token_type_ids, labels=labels, **options)
        outputs.logits = 3 * outputs.logits
        return outputs
"""


def dtypes(folder):
    with safe_open(folder / "model.safetensors", "pt") as file:
        return {file.get_tensor(name).dtype for name in file.keys()}  # noqa: SIM118


@pytest.mark.parametrize("told", [True, False])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_a_model_keeps_its_dtype(dtype, told, model_factory, tokenizer, csv_file, tmp_path, in_process):
    """It trains in float32, and is written as it came, with the sparsity and the scores of what is written."""
    folder = tmp_path / "model"
    model_factory().to(dtype).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    values = json.loads((folder / "config.json").read_text())
    if not told:  # as older releases of transformers wrote it
        del values["dtype"]
        (folder / "config.json").write_text(json.dumps(values))
    size = (folder / "model.safetensors").stat().st_size
    command = ["prune", "--model", str(folder), "--data", str(csv_file), *FAST, "--output"]
    assert main([*command, str(tmp_path / "run")]) == 0
    assert dtypes(tmp_path / "run" / "model") == {dtype}
    assert (tmp_path / "run" / "model" / "model.safetensors").stat().st_size == pytest.approx(size, rel=0.01)
    (row,) = json.loads((tmp_path / "run" / "metrics.json").read_text())["runs"]
    assert (row["sparsity"], row["reload_max_difference"]) == (0.5, 0.0)


def test_another_dtype_where_it_is_asked_for(model_factory, tokenizer, csv_file, tmp_path, in_process, capsys):
    model_factory().bfloat16().save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    command = ["prune", "--model", str(tmp_path / "model"), "--data", str(csv_file), *FAST, "--export-dtype"]
    assert main([*command, "float8", "--output", str(tmp_path / "no")]) == 2
    assert "export_dtype must be one of 'float32', 'bfloat16', 'float16', got 'float8'" in capsys.readouterr().err
    assert main([*command, "float32", "--output", str(tmp_path / "run")]) == 0
    assert dtypes(tmp_path / "run" / "model") == {torch.float32}


def test_no_path_of_this_machine_is_published(model_folder, csv_file, tmp_path, in_process):
    output = tmp_path / "run"
    command = [
        "prune",
        "--model",
        str(model_folder),
        "--data",
        str(csv_file),
        "--teacher-cache",
        str(tmp_path / "kept"),
    ]
    assert main([*command, "--test-data", str(csv_file), *FAST, "--output", str(output)]) == 0
    for file in (*(output / "model").iterdir(), output / "report.html", output / "metrics.json"):
        for path in (tmp_path, model_folder.parent, csv_file.parent):
            assert str(path).encode() not in file.read_bytes(), file
    card = (output / "model" / "README.md").read_text()
    assert f"- Base model: {model_folder.name}\n- Method: self-distilled pruning (SDP-CC, unstructured)" in card
    assert f"data: {csv_file.name}\n" in card
    assert "base_model:" not in card.split("---")[1]  # a folder is no id of the hub
    assert str(model_folder) in (output / "recipe.yaml").read_text()  # by which the run goes on


def test_blocks_of_one_column_are_told_as_such(model_folder, csv_file, tmp_path, in_process, capsys):
    command = ["prune", "--model", str(model_folder), "--data", str(csv_file), "--structure", "block"]
    options = ["--block-shape", "32x1", "--target-sparsity", "0.8", *FAST, "--output", str(tmp_path / "run")]
    assert main([*command, *options]) == 0
    said = capsys.readouterr().out
    assert "The speed-up was measured on this machine with sparse or narrower layers" in said
    assert "noise" not in said
    card = (tmp_path / "run" / "model" / "README.md").read_text()
    assert "blocks of 32x1" in card
    assert "| 32x1 | 2 |" in card  # in those of 64 x 32: others of 32 rows have whole columns
    assert "unstructured" not in card
    assert "no structure" not in card


@pytest.fixture
def own_folder(tokenizer, tmp_path, monkeypatch):
    """Return a folder with a model whose code is in it."""
    package = tmp_path / "own_package"
    package.mkdir()
    (package / "__init__.py").touch()
    (package / "configuration_own.py").write_text(CONFIGURATION)
    (package / "modeling_own.py").write_text(MODELING)
    monkeypatch.syspath_prepend(tmp_path)
    from own_package.configuration_own import OwnConfig  # type: ignore[import-not-found]
    from own_package.modeling_own import OwnForSequenceClassification  # type: ignore[import-not-found]

    OwnConfig.register_for_auto_class()
    OwnForSequenceClassification.register_for_auto_class("AutoModelForSequenceClassification")
    small = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}
    torch.manual_seed(0)
    model = OwnForSequenceClassification(OwnConfig(vocab_size=len(tokenizer), max_position_embeddings=32, **small))
    model.save_pretrained(tmp_path / "own")
    tokenizer.save_pretrained(tmp_path / "own")
    yield tmp_path / "own"
    for name in [name for name in sys.modules if name.partition(".")[0] == "own_package"]:
        del sys.modules[name]


def test_code_of_a_model_runs_only_where_it_is_trusted(own_folder, csv_file, tmp_path, capsys):
    """Through every command, and in the fresh process."""
    data = ["--data", str(csv_file)]
    output = ["--output", str(tmp_path / "run")]
    for command in (
        ["evaluate", str(own_folder), *data],
        ["prune", "--model", str(own_folder), *data, *FAST, *output],
        ["export", str(own_folder), *output],
        ["benchmark", str(own_folder), *output],
    ):
        assert main(command) == 2
        said = capsys.readouterr().err
        assert "needs code of its own (configuration_own.OwnConfig); read that code" in said
        assert said.count("\n") == 1
        assert "--trust-remote-code" in said
        assert not (tmp_path / "run").exists()
    assert main(["evaluate", str(own_folder), *data, "--trust-remote-code"]) == 0
    assert main(["prune", "--model", str(own_folder), *data, *FAST, *output, "--trust-remote-code"]) == 0
    (row,) = json.loads((tmp_path / "run" / "metrics.json").read_text())["runs"]
    assert (row["sparsity"], row["reload_max_difference"]) == (0.5, 0.0)
    model = tmp_path / "run" / "model"
    assert (model / "modeling_own.py").exists()
    assert "from_pretrained(FOLDER_OR_ID, trust_remote_code=True)" in (model / "README.md").read_text()
    compact = ["export", str(tmp_path / "run"), "--format", "compact", "--output", str(tmp_path / "compact")]
    assert main(compact) == 2
    assert main([*compact, "--trust-remote-code"]) == 0
    with pytest.raises(ValueError, match="needs code of its own"):
        sdprune.load(tmp_path / "compact")
    inputs = {"input_ids": torch.tensor([[2, 5, 6, 3]])}
    logits = [
        sdprune.load(tmp_path / "compact", variant, trust_remote_code=True)(**inputs).logits
        for variant in (None, "compact")
    ]
    torch.testing.assert_close(*logits)
    rows = Examples((("a film",), ("the plot",)), (0, 1))
    task = Task("own", ("bad", "good"), rows, rows, rows, ("accuracy",))
    plain = load_classifier(str(model), task, trust_remote_code=True).model
    torch.testing.assert_close(plain(**inputs).logits, logits[0])
    assert type(plain).__name__ == "OwnForSequenceClassification"


def test_a_class_of_its_own_under_a_known_type_is_not_taken_for_another(own_folder, csv_file, capsys):
    """Without its code, transformers would load the type's own class."""
    values = json.loads((own_folder / "config.json").read_text())
    values["model_type"] = "bert"
    del values["auto_map"]["AutoConfig"]
    (own_folder / "config.json").write_text(json.dumps(values))
    assert main(["evaluate", str(own_folder), "--data", str(csv_file)]) == 2
    assert "needs code of its own (modeling_own.OwnForSequenceClassification)" in capsys.readouterr().err
