"""What is exported is the model: exact zeros, equal logits, plain transformers."""

import json

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForSequenceClassification, DistilBertConfig, DistilBertForSequenceClassification

from sdprune import SDPruneConfig, export
from sdprune.masking.pruner import mask_model, prune_step
from sdprune.masking.swap import masked_layers, unswap


@pytest.fixture
def pruned(model):
    config = SDPruneConfig(target_sparsity=0.7)
    mask_model(model, config)
    prune_step(model, config, 0.7)
    return model, config


def test_exact_zeros_no_masks_and_a_section(pruned, tokenizer, tmp_path):
    model, config = pruned
    state = {name: value.clone() for name, value in model.state_dict().items()}
    folder = export(model, tmp_path / "model", config=config, processing_class=tokenizer)
    found = load_file(folder / "model.safetensors")
    assert not any(name.endswith(".mask") for name in found)
    for name, layer in masked_layers(model).items():
        assert bool((found[f"{name}.weight"][~layer.bit_mask.to_bool()] == 0).all())
    section = json.loads((folder / "config.json").read_text())["sdprune"]
    assert section["format"] == "plain"
    assert section["layers"] == {name: pytest.approx(0.7, abs=1e-3) for name in masked_layers(model)}
    assert SDPruneConfig.from_dict(section["pruning"]) == config
    assert (folder / "tokenizer_config.json").exists()
    assert "quantization_config" not in json.loads((folder / "config.json").read_text())
    for name, value in model.state_dict().items():  # the model itself stays masked and as it was
        assert torch.equal(value, state[name])


def test_values_under_the_mask_do_not_leak(model, tmp_path):
    mask_model(model, SDPruneConfig())
    prune_step(model, SDPruneConfig(), 0.5)
    with torch.no_grad():
        for layer in masked_layers(model).values():
            layer.weight.add_(1.0)  # as an optimizer step does before the zeros are put back
    export(model, tmp_path / "model")
    found = AutoModelForSequenceClassification.from_pretrained(tmp_path / "model")
    for name, layer in masked_layers(model).items():
        weight = found.get_submodule(name).weight
        assert torch.equal(weight == 0, ~layer.bit_mask.to_bool())


def test_a_dense_model_with_zeros_reports_them(pruned, tmp_path):
    model, config = pruned
    unswap(model)
    folder = export(model, tmp_path / "model", config=config)
    layers = json.loads((folder / "config.json").read_text())["sdprune"]["layers"]
    assert len(layers) == 12
    assert list(layers.values()) == pytest.approx([0.7] * 12, abs=1e-3)


@pytest.mark.parametrize("architecture", ["bert", "gpt2"])
@pytest.mark.parametrize("form", ["plain", "compact"])
@pytest.mark.parametrize(
    ("criterion", "structure"), [("magnitude", "block"), ("movement", "unstructured"), ("l0", "block")]
)
def test_a_model_that_is_still_masked(make_dense, architecture, form, criterion, structure, tmp_path):
    """Scores and masks stay out, values under the masks too; the gates of l0 are in the weights."""
    auto_class, model = make_dense(architecture)
    names = list(model.state_dict())
    sides = {"block_shape": (16, 16)} if structure == "block" else {}
    config = SDPruneConfig(criterion=criterion, structure=structure, **sides)
    mask_model(model, config)
    for layer in masked_layers(model).values():
        if layer.score is not None:
            layer.score.normal_()  # so that the gates of the kept blocks are not 1
            layer.score_steps += 1
    prune_step(model, config, 0.8)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    variant = "compact" if form == "compact" else None
    folder = export(model, tmp_path / "model", form, config=config)
    for file in folder.glob("*.safetensors"):
        assert not any("score" in name for name in load_file(file))
    assert list(load_file(folder / "model.safetensors")) == sorted(set(names) - {"lm_head.weight"})
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name])
    found = auto_class.from_pretrained(folder, variant=variant).eval()
    unswap(model)
    ids = torch.arange(3, 19)[None]
    with torch.inference_mode():
        torch.testing.assert_close(found(ids).logits, model(ids).logits, rtol=1e-4, atol=1e-5)
    layers = json.loads((folder / "config.json").read_text())["sdprune"]["layers"]
    assert sum(layers.values()) / len(layers) == pytest.approx(0.8, abs=0.02)
    if form == "plain":
        assert all(torch.equal(value, found.state_dict()[name]) for name, value in model.state_dict().items())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_stays_exact(model, tmp_path, dtype):
    model.to(dtype)
    mask_model(model, SDPruneConfig())
    prune_step(model, SDPruneConfig(), 0.5)
    export(model, tmp_path / "model")
    found = AutoModelForSequenceClassification.from_pretrained(tmp_path / "model", dtype="auto")
    for name, value in found.state_dict().items():
        assert value.dtype is dtype
        assert torch.equal(value, model.state_dict()[name])


def test_another_architecture(tmp_path):
    torch.manual_seed(0)
    values = {"dim": 16, "n_layers": 1, "n_heads": 2, "hidden_dim": 32, "vocab_size": 20}
    model = DistilBertForSequenceClassification(DistilBertConfig(**values)).eval()
    mask_model(model, SDPruneConfig())
    prune_step(model, SDPruneConfig(), 0.5)
    ids = torch.arange(12).reshape(2, 6)
    with torch.inference_mode():
        expected = model(ids).logits
        export(model, tmp_path / "model")
        found = AutoModelForSequenceClassification.from_pretrained(tmp_path / "model").eval()(ids).logits
    assert torch.equal(found, expected)


def test_wrong_input(pruned, tmp_path):
    model, _ = pruned
    with pytest.raises(ValueError, match="format must be one of 'plain', 'portable', 'compact', got 'compac'"):
        export(model, tmp_path / "a", "compac")
    with pytest.raises(TypeError, match="model must be a transformers model, got Linear"):
        export(torch.nn.Linear(2, 2), tmp_path / "a")
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "file").write_text("x")
    with pytest.raises(ValueError, match="already exists"):
        export(model, tmp_path / "b")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["b"]
