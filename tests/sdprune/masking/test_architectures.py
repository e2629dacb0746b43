"""Every structure on ten architectures: swapped, pruned, trained and swapped back."""

import pytest
import torch

from sdprune import SDPruneConfig
from sdprune.masking.coupling import find_couplings
from sdprune.masking.linears import is_linear, matrix
from sdprune.masking.pruner import gather, mask_model, masked_fraction, measure_sparsity, prune_step, zero_pruned
from sdprune.masking.swap import masked_layers, unswap

STRUCTURES = {
    "unstructured": {},
    "block": {"block_shape": (8, 4)},
    "n:m": {"n": 1, "m": 2},
    "neuron": {},
    "head": {},
    "hybrid": {"block_shape": (4, 8)},
}


def logits(model, inputs):
    with torch.no_grad():
        return model(**inputs).logits


def train(model, inputs, steps=2):
    model.train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=0.1)
    for _ in range(steps):
        model(**inputs).loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 0.1)
        optimizer.step()
        zero_pruned(model)
        optimizer.zero_grad()
    model.eval()


@pytest.mark.parametrize("structure", STRUCTURES)
def test_prune_train_and_swap_back(architecture, structure, build, inputs_for):
    model = build(architecture)
    inputs = inputs_for(model)
    config = SDPruneConfig(structure=structure, **STRUCTURES[structure])
    before = logits(model, inputs)
    untouched = {name: value.detach().clone() for name, value in model.named_parameters()}
    found = mask_model(model, config)
    assert torch.equal(logits(model, inputs), before)
    prune_step(model, config, 0.5, found)
    layers = masked_layers(model)
    for name, value in model.named_parameters():  # embeddings, norms, heads and biases
        if name.rpartition(".")[0] not in layers or name.endswith("bias"):
            assert torch.equal(value, untouched[name])
    masks = {name: layer.bit_mask.to_bool() for name, layer in layers.items()}
    assert all(float(mask.float().mean()) == 0.5 for mask in masks.values())
    train(model, inputs)
    for name, layer in layers.items():
        assert torch.equal(layer.bit_mask.to_bool(), masks[name])
        assert torch.equal(layer.matrix != 0, masks[name])
    assert measure_sparsity(model).linear == masked_fraction(model) == 0.5
    trained = logits(model, inputs)
    assert not torch.equal(trained, before)
    names = list(layers)
    unswap(model)
    torch.testing.assert_close(logits(model, inputs), trained, rtol=0, atol=0)
    kind = "Conv1D" if architecture == "gpt2" else "Linear"
    assert all(type(model.get_submodule(name)).__name__ == kind for name in names)
    assert set(dict(model.named_parameters())) == set(untouched)


def test_a_pruned_head_or_neuron_contributes_nothing(architecture, build, inputs_for):
    """The logits are those of the dense model whose unit is silenced at the consumer's input."""
    for structure in ("head", "neuron"):
        model, dense = build(architecture), build(architecture)
        inputs = inputs_for(model)
        config = SDPruneConfig(structure=structure, criterion="random")
        found = mask_model(model, config)
        prune_step(model, config, 0.5, found)
        for coupling in find_couplings(dense):
            if coupling.kind != structure:
                continue
            kept = masked_layers(model)[coupling.consumer].bit_mask.to_bool().any(0)[coupling.columns[:, 0]]
            assert int(kept.sum()) * 2 == coupling.units
            silent = coupling.columns[~kept].flatten()

            def silence(module, args, columns=silent):
                rows = args[0].clone()
                rows[..., columns] = 0.0
                return (rows, *args[1:])

            dense.get_submodule(coupling.consumer).register_forward_pre_hook(silence)
        torch.testing.assert_close(logits(model, inputs), logits(dense, inputs), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("criterion", ["gradient", "taylor", "movement", "soft_movement", "l0", "epsd", "lookahead"])
@pytest.mark.parametrize("structure", STRUCTURES)
def test_every_criterion_prunes_every_kind_of_layer(criterion, structure, build, inputs_for):
    for architecture in ("gpt2", "llama"):
        model = build(architecture)
        inputs = inputs_for(model)
        schedule = {"schedule": "one_shot", "pruning_steps": 1} if criterion == "epsd" else {}
        config = SDPruneConfig(
            structure=structure, criterion=criterion, start_ratio=0.1, **STRUCTURES[structure], **schedule
        )
        found = mask_model(model, config)
        model.train()
        for _ in range(2):
            model(**inputs).loss.backward()
            gather(model, config)
        prune_step(model, config, 0.5, found)
        model.eval()
        assert masked_fraction(model) == 0.5
        for layer in masked_layers(model).values():
            layer.settle()
        pruned = logits(model, inputs)
        unswap(model)
        torch.testing.assert_close(logits(model, inputs), pruned, rtol=1e-5, atol=1e-6)
        for name in found.layers:
            weight = matrix(model.get_submodule(name))
            assert is_linear(model.get_submodule(name))
            assert int((weight == 0).sum()) * 2 == weight.numel()
