"""`sdprune export` of runs, unfinished ones too, and into other forms."""

import json

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForSequenceClassification, TrainerCallback

from sdprune import SDPruneConfig, prune
from sdprune.cli import main
from sdprune.methods.criteria import expected_gate
from sdprune.runs.export_folder import export_folder

SCHEDULE = {"pruning_steps": 3, "start_ratio": 0.25, "end_ratio": 1.0}


class Crash(TrainerCallback):
    """Ends the run after its checkpoint, in the middle of the schedule."""

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == 6:
            raise ConnectionError("the machine went away")


@pytest.fixture
def interrupted(model_factory, dataset_factory, tokenizer, arguments, tmp_path):
    def run(config):
        model = model_factory(num_hidden_layers=1)
        args = arguments(max_steps=8, save_strategy="steps", save_steps=5, learning_rate=0.05)
        with pytest.raises(ConnectionError):
            prune(model, config, dataset_factory(44), args=args, processing_class=tokenizer, callbacks=[Crash()])
        return load_file(tmp_path / "run" / "checkpoint-5" / "model.safetensors")

    return run


@pytest.mark.parametrize(
    ("criterion", "structure"), [("magnitude", "unstructured"), ("movement", "unstructured"), ("l0", "block")]
)
def test_an_unfinished_run(interrupted, tmp_path, criterion, structure):
    """Its masks and gates are applied: the checkpoint itself keeps what they hide, where it may come back."""
    sides = {"block_shape": (8, 8)} if structure == "block" else {}
    config = SDPruneConfig(
        criterion=criterion, structure=structure, pruning_steps=3, start_ratio=0.25, end_ratio=1.0, **sides
    )
    state = interrupted(config)
    folder = export_folder(tmp_path / "run", tmp_path / "model", "plain")
    found = load_file(folder / "model.safetensors")
    layers = [name.removesuffix(".mask") for name in state if name.endswith(".mask")]
    assert len(layers) == 6
    assert not any(name.endswith((".mask", ".score", ".score_steps")) for name in found)
    zeros = 0.0
    for name in layers:
        weight, expected = found[f"{name}.weight"], state[f"{name}.weight"]
        if criterion == "l0":
            gate = expected_gate(state[f"{name}.score"]).clamp(min=0.01)
            expected = expected * gate.repeat_interleave(8, 0).repeat_interleave(8, 1)
        kept = weight != 0
        assert torch.equal(weight[kept], expected[kept])
        zeros += float((~kept).float().mean()) / len(layers)
        assert bool((expected[~kept] != 0).any()) == (criterion == "movement")
    section = json.loads((folder / "config.json").read_text())["sdprune"]
    assert zeros == pytest.approx(sum(section["layers"].values()) / len(layers))
    assert 0.1 < zeros < 0.5
    assert section["pruning"]["criterion"] == criterion


def test_a_checkpoint_whose_configuration_is_missing(interrupted, tmp_path):
    interrupted(SDPruneConfig(criterion="movement", **SCHEDULE))
    for folder in ("run", "run/checkpoint-5"):
        (tmp_path / folder / "sdprune_config.json").unlink()
    with pytest.raises(FileNotFoundError, match=r"sdprune_config\.json is missing, which tells what the scores are"):
        export_folder(tmp_path / "run" / "checkpoint-5", tmp_path / "model")
    assert not (tmp_path / "model").exists()


def test_masks_of_another_model(interrupted, tmp_path):
    interrupted(SDPruneConfig(**SCHEDULE))
    path = tmp_path / "run" / "checkpoint-5" / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"num_hidden_layers": 0}))
    with pytest.raises(ValueError, match=r"model\.safetensors: .*mask does not fit the model of config\.json"):
        export_folder(tmp_path / "run" / "checkpoint-5", tmp_path / "model")


def test_onnx(model_folder, tokenizer, tmp_path, capsys):
    runtime = pytest.importorskip("onnxruntime", reason="needs the extra onnx: pip install 'sdprune[onnx]'")
    pytest.importorskip("onnxscript", reason="needs the extra onnx: pip install 'sdprune[onnx]'")
    assert main(["export", str(model_folder), "--output", str(tmp_path / "onnx"), "--format", "onnx"]) == 0
    assert capsys.readouterr().out.strip() == str(tmp_path / "onnx")
    model = AutoModelForSequenceClassification.from_pretrained(model_folder).eval()
    assert json.loads((tmp_path / "onnx" / "config.json").read_text())["architectures"]
    inputs = dict(tokenizer(["a witty film", "the plot"], padding=True, return_tensors="pt"))
    session = runtime.InferenceSession(tmp_path / "onnx" / "model.onnx")
    assert {value.name for value in session.get_inputs()} == set(inputs)
    (found,) = session.run(None, {name: value.numpy() for name, value in inputs.items()})
    with torch.inference_mode():
        torch.testing.assert_close(torch.from_numpy(found), model(**inputs).logits, rtol=1e-4, atol=1e-5)


def test_onnx_without_its_extra(model_folder, tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(__import__("sys").modules, "onnxruntime", None)
    assert main(["export", str(model_folder), "--output", str(tmp_path / "onnx"), "--format", "onnx"]) == 1
    assert "pip install 'sdprune[onnx]'" in capsys.readouterr().err
