"""Structures: exact counts in every scope, floors, and what a layer cannot take."""

import pytest
import torch
from torch import nn

from sdprune import SDPruneConfig
from sdprune.masking.coupling import find_couplings
from sdprune.masking.partition import Partition, least_kept, reached_sparsity
from sdprune.masking.pruner import mask_model, masked_fraction, prune_step
from sdprune.masking.swap import masked_layers


def kept_units(model, coupling):
    columns = masked_layers(model)[coupling.consumer].bit_mask.to_bool().any(0)
    return columns[coupling.columns[:, 0]]


@pytest.mark.parametrize("sparsity", [0.1, 0.33, 0.5, 0.9])
def test_every_layer_loses_its_neurons_to_one(model, sparsity):
    config = SDPruneConfig(structure="neuron", target_sparsity=sparsity)
    found = mask_model(model, config)
    assert len(masked_layers(model)) == 4
    prune_step(model, config, sparsity, found)
    for coupling in found.couplings:
        if coupling.kind == "neuron":
            kept = kept_units(model, coupling)
            assert int((~kept).sum()) == round(sparsity * 64)
            (producer,) = coupling.producers
            assert torch.equal(masked_layers(model)[producer].bit_mask.to_bool().all(1), kept)
    assert masked_fraction(model) == round(sparsity * 64) / 64
    assert abs(masked_fraction(model) - sparsity) <= found.tolerance(config)


def test_the_neurons_with_the_smallest_weights_go(model):
    first = model.bert.encoder.layer[0].intermediate.dense.weight.detach().clone()
    second = model.bert.encoder.layer[0].output.dense.weight.detach().clone()
    config = SDPruneConfig(structure="neuron")
    found = mask_model(model, config)
    prune_step(model, config, 0.25, found)
    coupling = next(each for each in found.couplings if each.consumer.endswith("0.output.dense"))
    kept = kept_units(model, coupling)
    scores = first.abs().sum(1) + second.abs().sum(0)
    assert scores[kept].min() > scores[~kept].max()


def test_global_scope_ranks_the_neurons_of_all_layers_together(model):
    config = SDPruneConfig(structure="neuron", scope="global")
    with torch.no_grad():
        model.bert.encoder.layer[0].output.dense.weight.mul_(1.03)
    found = mask_model(model, config)
    prune_step(model, config, 0.4, found)
    pruned = [int((~kept_units(model, each)).sum()) for each in found.couplings if each.kind == "neuron"]
    assert sum(pruned) == round(0.4 * 128)
    assert pruned[0] < pruned[1]


def test_what_is_pruned_stays_pruned(model):
    for structure, levels in (("neuron", (0.2, 0.5, 0.7)), ("n:m", (0.3, 0.5, 0.75))):
        config = SDPruneConfig(structure=structure, target_sparsity=0.75, n=1, m=4)
        found = mask_model(model, config)
        before = None
        for level in levels:
            with torch.no_grad():
                for layer in masked_layers(model).values():
                    layer.weight.add_(torch.randn_like(layer.weight))
            prune_step(model, config, level, found)
            masks = {name: layer.bit_mask.to_bool() for name, layer in masked_layers(model).items()}
            assert before is None or not any(bool((masks[name] & ~before[name]).any()) for name in masks)
            before = masks


def test_n_of_m_falls_to_n(model):
    config = SDPruneConfig(structure="n:m", n=2, m=8, target_sparsity=0.75)
    mask_model(model, config)
    for asked, kept in ((0.1, 8), (0.3, 6), (0.5, 4), (0.74, 3), (0.75, 2)):
        prune_step(model, config, asked)
        assert reached_sparsity(asked, config) == masked_fraction(model) == 1 - kept / 8
        for layer in masked_layers(model).values():
            assert bool((layer.bit_mask.to_bool().view(-1, 8).sum(1) == kept).all())


def test_hybrid_prunes_blocks_in_attention_and_neurons_elsewhere(model):
    config = SDPruneConfig(structure="hybrid", block_shape=(16, 8))
    found = mask_model(model, config)
    prune_step(model, config, 0.5, found)
    for name, layer in masked_layers(model).items():
        attention = "attention" in name
        assert layer.block_shape == ((16, 8) if attention else None)
        kept = layer.bit_mask.to_bool()
        if attention:
            assert int(layer.bit_mask.to_blocks().sum()) == 4
        else:
            assert bool((kept.all(1) | ~kept.any(1)).all()) or bool((kept.all(0) | ~kept.any(0)).all())
        assert layer.sparsity == 0.5


@pytest.mark.parametrize("structure", ["unstructured", "block", "neuron"])
def test_a_floor_lets_no_layer_die(model, structure):
    config = SDPruneConfig(
        structure=structure, scope="global", block_shape=(4, 8), target_sparsity=0.8, min_layer_density=0.125
    )
    found = mask_model(model, config)
    name = "bert.encoder.layer.1.intermediate.dense"
    with torch.no_grad():
        masked_layers(model)[name].weight.mul_(1e-6)
        masked_layers(model)["bert.encoder.layer.1.output.dense"].weight.mul_(1e-6)
    prune_step(model, config, 0.8, found)
    assert masked_layers(model)[name].sparsity == 0.875
    assert abs(masked_fraction(model) - 0.8) <= found.tolerance(config)
    free = SDPruneConfig(structure=structure, scope="global", block_shape=(4, 8), target_sparsity=0.8)
    with pytest.raises(ValueError, match=r"layer 'bert\.encoder\.layer\.1\..*' would lose all"):
        prune_step(model, free, 0.9, Partition.of(model, list(masked_layers(model)), free))


@pytest.mark.parametrize("scope", ["layer", "global"])
def test_a_floor_between_two_units_leaves_the_choice_to_the_scores(model_factory, scope):
    model = model_factory(hidden_size=36, num_attention_heads=3)  # a floor of 0.4 is 1.2 heads, and one is left
    config = SDPruneConfig(structure="head", scope=scope, target_sparsity=0.6, min_layer_density=0.4)
    with torch.no_grad():
        for layer in model.bert.encoder.layer:
            for part in (layer.attention.self.query, layer.attention.self.key, layer.attention.self.value):
                part.weight.copy_(torch.tensor([1e-3, 1e-2, 1.0]).repeat_interleave(12)[:, None].expand(36, 36))
    prune_step(model, config, 0.6, mask_model(model, config))
    for layer in model.bert.encoder.layer:
        kept = layer.attention.self.query.bit_mask.to_bool().any(1)
        assert kept.tolist() == [False] * 24 + [True] * 12


@pytest.mark.parametrize(
    ("density", "counts", "kept", "least"),
    [
        (0.0, [9], 3, [0]),
        (0.4, [3], 1, [1]),  # 1.2 units, and one is left
        (0.4, [3], 2, [2]),
        (0.1, [2, 2], 2, [1, 1]),
        (1.0 - 0.7, [10], 3, [3]),
        (0.29, [100], 29, [29]),
        (0.25, [6, 6], 3, [1, 1]),
        (0.25, [6, 6], 4, [2, 2]),
    ],
)
def test_what_a_floor_keeps(density, counts, kept, least):
    assert least_kept(density, counts, kept) == least


def test_grouped_queries_go_with_their_key_and_value(build):
    model = build("llama")
    config = SDPruneConfig(structure="head")
    found = mask_model(model, config)
    prune_step(model, config, 0.5, found)
    layer = "model.layers.0.self_attn."
    rows = {name: masked_layers(model)[layer + name].bit_mask.to_bool().any(1) for name in ("q_proj", "k_proj")}
    assert torch.equal(rows["q_proj"].view(2, 16).all(1), rows["k_proj"].view(2, 8).all(1))
    assert int(rows["k_proj"].sum()) == 8


def test_one_matrix_of_a_coupling_alone_may_be_chosen(model):
    config = SDPruneConfig(structure="head", target_modules=r".*\.(query|value|attention\.output\.dense)")
    found = mask_model(model, config)
    assert len(masked_layers(model)) == 6
    prune_step(model, config, 0.5, found)
    assert masked_fraction(model) == 0.5


def test_a_structure_that_finds_nothing_says_what_it_looked_at(model):
    config = SDPruneConfig(structure="head", target_modules=r".*\.(intermediate|output)\.dense")
    with pytest.raises(ValueError, match=r"structure='head' finds no heads among the layers .*intermediate\.dense"):
        mask_model(model, config)
    with pytest.raises(ValueError, match="no neurons or heads to prune among"):
        mask_model(model, SDPruneConfig(structure="neuron", target_modules=r".*intermediate\.dense"))
    assert not masked_layers(model)


def test_groups_that_do_not_divide_name_the_layer(model):
    config = SDPruneConfig(structure="n:m", n=3, m=6, target_sparsity=0.5)
    with pytest.raises(ValueError, match=r"m=6 does not divide the input size of layer 'bert\.encoder.* \(32, 32\)"):
        mask_model(model, config)
    assert not masked_layers(model)


def test_a_layer_in_two_couplings_is_refused():
    class Shared(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.blocks = nn.ModuleList([nn.ModuleDict({n: nn.Linear(4, 4) for n in ("up", "down", "side")})])
            block = self.blocks[0]
            block.forward = lambda rows: (lambda up: block["down"](up) + block["side"](up))(block["up"](rows).relu())
            self.main_input_name = "input_ids"
            self.config = type("Config", (), {"get_text_config": lambda own: own, "vocab_size": 9})()
            self.embedding = nn.Embedding(9, 4)

        def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
            return self.blocks[0](self.embedding(input_ids))

    model = Shared()
    assert len(find_couplings(model)) == 2
    with pytest.raises(ValueError, match=r"cannot prune layer 'blocks\.0\.up': it has a part in the units of both"):
        mask_model(model, SDPruneConfig(structure="neuron"))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"structure": "n:m", "target_sparsity": 0.6}, r"target_sparsity must be 1 - n / m = 0\.5 .*got 0\.6"),
        ({"structure": "n:m", "scope": "global"}, "scope must be 'layer' with structure='n:m'"),
        ({"n": 5}, "n and m must satisfy 0 < n <= m, got n=5 and m=4"),
        ({"magnitude_norm": 3}, "magnitude_norm must be 1 or 2, got 3"),
        ({"block_reduction": "median"}, "block_reduction must be one of 'sum', 'mean', 'max', got 'median'"),
        ({"sparsity_penalty": -1.0}, "sparsity_penalty must be a finite number >= 0.0, got -1.0"),
        ({"score_learning_rate": 0.0}, "score_learning_rate must be a finite number > 0, got 0.0"),
        ({"min_layer_density": 1.0}, r"min_layer_density must lie in \[0, 1\), got 1.0"),
        ({"min_layer_density": 0.6}, "min_layer_density must be at most 1 - target_sparsity = 0.5, got 0.6"),
        ({"criterion": "epsd"}, "schedule must be 'one_shot' with criterion='epsd', got 'geometric'"),
    ],
)
def test_wrong_values_are_named(fields, message):
    with pytest.raises(ValueError, match=message):
        SDPruneConfig(**fields)
