"""Neurons and heads are found by probing, whatever the layers are called."""

import copy

import pytest
import torch
from torch import nn

from sdprune.masking.coupling import find_couplings
from sdprune.masking.linears import matrix


def test_every_architecture_has_its_heads_and_neurons(architecture, build):
    model = build(architecture)
    couplings = find_couplings(model)
    heads = [each for each in couplings if each.kind == "head"]
    neurons = [each for each in couplings if each.kind == "neuron"]
    assert len(heads) == (6 if "t5" in architecture else 2)  # a decoder block has two attentions
    assert len(neurons) == (4 if "t5" in architecture else 2)
    groups = 2 if architecture == "llama" else 4
    for each in heads:
        assert each.columns.shape == (groups, 32 // groups)
        rows = {"modernbert": [24], "gpt2": [24], "llama": [16, 8, 8]}.get(architecture, [8, 8, 8])
        assert [found.shape for found in each.producers.values()] == [(groups, count) for count in rows]
    for each in neurons:
        inner = 128 if architecture == "gpt2" else 64
        assert each.units == inner
        gates = {"modernbert": [2], "llama": [1, 1], "t5-gated": [1, 1]}.get(architecture, [1])
        assert [found.shape for found in each.producers.values()] == [(inner, count) for count in gates]
    for each in couplings:  # every column and every row belongs to exactly one unit
        for layer, members in [(each.consumer, each.columns), *each.producers.items()]:
            size = matrix(model.get_submodule(layer)).shape[1 if layer == each.consumer else 0]
            assert torch.equal(members.flatten().sort().values, torch.arange(size))


def test_a_unit_without_its_rows_has_nothing_to_say(architecture, build, inputs_for):
    """Scaling the rows of one unit changes the consumer's input in the columns of that unit, and only there."""
    model = build(architecture)
    inputs = inputs_for(model)
    seen = {}
    for coupling in find_couplings(model)[:2]:
        module = model.get_submodule(coupling.consumer)
        handle = module.register_forward_pre_hook(lambda _, args: seen.update(input=args[0]))
        with torch.no_grad():
            model(**inputs)
            before = seen["input"]
            for name, rows in coupling.producers.items():
                layer = model.get_submodule(name)
                matrix(layer)[rows[1]] *= 3.0
                if layer.bias is not None:
                    layer.bias[rows[1]] *= 3.0
            model(**inputs)
        handle.remove()
        changed = (seen["input"] != before).flatten(0, -2).any(0)
        assert set(changed.nonzero().flatten().tolist()) == set(coupling.columns[1].tolist())


def test_probing_leaves_no_trace(architecture, build):
    model = build(architecture).train()
    model.get_submodule(find_couplings(model)[0].consumer).eval()
    modes = [module.training for module in model.modules()]
    state = copy.deepcopy(model.state_dict())
    attention = model.config._attn_implementation
    inner = [set(module.__dict__) for module in model.modules()]
    torch.manual_seed(3)
    expected = torch.rand(3)
    torch.manual_seed(3)
    find_couplings(model)
    assert torch.equal(torch.rand(3), expected)
    assert [module.training for module in model.modules()] == modes
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    assert model.config._attn_implementation == attention
    assert [set(module.__dict__) for module in model.modules()] == inner
    assert all(not module._forward_pre_hooks for module in model.modules())


def test_a_forward_set_on_the_instance_survives(model):
    layer = model.bert.encoder.layer[0].output.dense
    own = layer.forward
    layer.forward = own
    find_couplings(model)
    assert layer.__dict__["forward"] is own


def test_only_the_named_layers_take_part(model):
    everything = find_couplings(model)
    names = [
        "bert.encoder.layer.0.intermediate.dense",
        "bert.encoder.layer.0.output.dense",
        "bert.encoder.layer.1.attention.self.value",
        "bert.encoder.layer.1.attention.output.dense",
    ]
    found = find_couplings(model, names)
    assert [each.consumer for each in found] == [names[1], names[3]]
    assert list(found[1].producers) == [names[2]]
    assert torch.equal(found[1].columns, everything[2].columns)
    with pytest.raises(ValueError, match=r"no neurons or heads to prune among bert\.encoder\.layer\.0\.output\.dense"):
        find_couplings(model, names[1:2])


class Mixer(nn.Module):
    """A model of no library: one stack of blocks whose second matrix sees every second feature swapped."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(nn.ModuleDict({"up": nn.Linear(6, 8), "down": nn.Linear(4, 6)}) for _ in range(2))
        for block in self.blocks:
            block.forward = lambda rows, own=block: rows + own["down"](own["up"](rows).relu().view(-1, 2, 4).sum(1))

    def forward(self, rows: torch.Tensor) -> torch.Tensor:
        for block in self.blocks:
            rows = block(rows)
        return rows


def test_another_model_takes_inputs():
    model = Mixer()
    with pytest.raises(ValueError, match="Mixer takes neither input_ids nor pixel_values; pass `inputs`"):
        find_couplings(model)
    first, second = find_couplings(model, inputs={"rows": torch.ones(1, 6)})
    assert (first.consumer, second.consumer) == ("blocks.0.down", "blocks.1.down")
    assert first.producers["blocks.0.up"].tolist() == [[0, 4], [1, 5], [2, 6], [3, 7]]


def test_nothing_to_find_is_an_error():
    with pytest.raises(ValueError, match=r"found no nn\.ModuleList with linear layers"):
        find_couplings(nn.Sequential(nn.Linear(4, 4)))


def test_masked_layers_are_probed_like_others(model):
    from sdprune import SDPruneConfig
    from sdprune.masking.pruner import mask_model, prune_step

    expected = find_couplings(copy.deepcopy(model))
    mask_model(model, SDPruneConfig())
    prune_step(model, SDPruneConfig(), 0.5)
    found = find_couplings(model)
    assert [each.consumer for each in found] == [each.consumer for each in expected]
    assert all(torch.equal(a.columns, b.columns) for a, b in zip(found, expected, strict=True))
