"""What is empty leaves the matrices: they are smaller and dense, and the logits stay."""

import copy

import pytest
import torch

import sdprune
from sdprune import export
from sdprune.exports.neurons import compact
from sdprune.layers.narrow import NarrowLinear, RemovedLinear
from sdprune.masking.coupling import find_couplings
from sdprune.masking.linears import matrix


@torch.no_grad()
def empty_units(model, kinds=("neuron", "head"), feeders=True):
    """Zero every other neuron, and the first head, with or without the weights that feed them."""
    for coupling in find_couplings(model):
        if coupling.kind not in kinds:
            continue
        gone = slice(0, None, 2) if coupling.kind == "neuron" else slice(0, 1)
        matrix(model.get_submodule(coupling.consumer))[:, coupling.columns[gone].flatten()] = 0
        for name, rows in coupling.producers.items():
            layer = model.get_submodule(name)
            if layer.bias is not None:
                layer.bias.normal_()  # what an unread unit returns must not matter
            if feeders:
                matrix(layer)[rows[gone].flatten()] = 0


def logits(model):
    ids = torch.arange(3, 35).reshape(2, 16)
    extra = {"decoder_input_ids": ids[:, :5]} if model.config.is_encoder_decoder else {}
    with torch.inference_mode():
        return model(ids, **extra).logits


@pytest.fixture
def dense_model(make_dense, architecture):
    return make_dense(architecture)


def test_neurons_and_heads_leave(dense_model, tmp_path):
    auto_class, model = dense_model
    empty_units(model, feeders=False)
    expected, parameters = logits(model), sum(value.numel() for value in model.parameters())
    small = compact(copy.deepcopy(model))
    torch.testing.assert_close(logits(small), expected, rtol=1e-4, atol=1e-5)
    assert sum(value.numel() for value in small.parameters()) < parameters
    for coupling in find_couplings(model):
        layers = [small.get_submodule(name) for name in (coupling.consumer, *coupling.producers)]
        if coupling.kind == "neuron":
            assert all(type(layer) is RemovedLinear for layer in layers)
            assert layers[0].weight.shape[1] == 48
            assert all(layer.weight.shape[0] == 48 and layer.out_features == 48 for layer in layers[1:])
            assert all(type(layer).forward is torch.nn.Linear.forward for layer in layers)
        else:
            assert all(isinstance(layer, NarrowLinear) for layer in layers)
    small.save_pretrained(tmp_path / "saved")
    again = auto_class.from_pretrained(tmp_path / "saved")
    assert torch.equal(logits(again), logits(small))
    for name, value in small.state_dict().items():
        assert torch.equal(again.state_dict()[name], value), name
    for format in ("plain", "compact"):
        export(small, tmp_path / format, format)
    plain = auto_class.from_pretrained(tmp_path / "plain")
    assert type(plain.get_submodule(coupling.consumer)) is type(model.get_submodule(coupling.consumer))
    torch.testing.assert_close(logits(plain), expected, rtol=1e-4, atol=1e-5)
    for found in (
        auto_class.from_pretrained(tmp_path / "compact", variant="compact"),
        sdprune.load(tmp_path / "compact", "compact"),
    ):
        assert torch.equal(logits(found), logits(small))


@pytest.mark.parametrize("variant", [None, "compact"])
@pytest.mark.parametrize("architecture", ["bert", "gpt2", "llama"])
def test_exporting_removes_pruned_neurons(make_dense, architecture, variant, tmp_path):
    """Only where neither what feeds them nor what reads them is left, so that every weight comes back as it was."""
    auto_class, model = make_dense(architecture)
    empty_units(model)
    folder = export(model, tmp_path / "model", "compact")
    found = auto_class.from_pretrained(folder, variant=variant)
    removed = {name for name, layer in found.named_modules() if isinstance(layer, RemovedLinear)}
    neurons = [coupling for coupling in find_couplings(model) if coupling.kind == "neuron"]
    assert removed == {name for coupling in neurons for name in (coupling.consumer, *coupling.producers)}
    torch.testing.assert_close(logits(found), logits(model), rtol=1e-4, atol=1e-5)
    export(found, tmp_path / "plain", "plain")
    plain = auto_class.from_pretrained(tmp_path / "plain")
    for name, value in model.state_dict().items():
        assert torch.equal(plain.state_dict()[name], value), name
    with torch.no_grad():
        for parameter in found.parameters():
            parameter.zero_()
    found.load_state_dict(model.state_dict())  # dense, as a Trainer's checkpoint has them
    torch.testing.assert_close(logits(found), logits(model), rtol=1e-4, atol=1e-5)


def test_neurons_that_are_fed_stay(make_dense, tmp_path):
    auto_class, model = make_dense("bert")
    empty_units(model, kinds=("neuron",), feeders=False)
    found = auto_class.from_pretrained(export(model, tmp_path / "model", "portable"))
    layer = found.bert.encoder.layer[0]
    assert type(layer.intermediate.dense) is torch.nn.Linear
    assert isinstance(layer.output.dense, NarrowLinear)
    assert torch.equal(layer.output.dense.to_linear().weight, model.bert.encoder.layer[0].output.dense.weight)


@pytest.mark.parametrize("architecture", ["bert", "gpt2", "llama"])
def test_layers_without_any_weight(make_dense, architecture, tmp_path):
    """All neurons of one layer, and all heads of another, are gone."""
    auto_class, model = make_dense(architecture)
    couplings = find_couplings(model)
    first = {kind: next(coupling for coupling in couplings if coupling.kind == kind) for kind in ("neuron", "head")}
    with torch.no_grad():
        for coupling in first.values():
            for name in (coupling.consumer, *coupling.producers):
                model.get_submodule(name).weight.zero_()
    folder = export(model, tmp_path / "model", "compact")
    for variant in (None, "compact"):
        for found in (auto_class.from_pretrained(folder, variant=variant), sdprune.load(folder, variant)):
            torch.testing.assert_close(logits(found), logits(model))
            assert found.get_submodule(first["neuron"].consumer).weight.numel() == 0
            found.save_pretrained(tmp_path / "again")
            again = auto_class.from_pretrained(tmp_path / "again")
            torch.testing.assert_close(logits(again), logits(model))


def test_nothing_to_remove(make_dense):
    _, model = make_dense("bert")
    with pytest.raises(ValueError, match="model must have empty neurons, heads, rows or columns"):
        compact(model)


def test_a_small_model_trains(make_dense):
    _, model = make_dense("bert")
    empty_units(model)
    small = compact(model).train()
    small(torch.arange(3, 19)[None], labels=torch.tensor([1])).loss.backward()
    assert all(parameter.grad is not None for name, parameter in small.named_parameters())
