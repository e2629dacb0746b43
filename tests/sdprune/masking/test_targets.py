"""Targets that would leave nothing of a layer are refused before anything is changed, with advice that helps."""

import re

import pytest
import torch

from sdprune import SDPruneConfig, prune
from sdprune.masking.pruner import mask_model, masked_fraction, prune_step
from sdprune.masking.swap import masked_layers, unswap

UNREACHABLE = {  # what cannot be reached, what is said, and what is reached by the advice that it gives
    "heads": (
        {"structure": "head", "target_sparsity": 0.9},
        r"target_sparsity=0\.9 leaves nothing of layer 'bert\.encoder\.layer\.0\.attention\.output\.dense', which has "
        r"2 units \(head\): lower it to at most 0\.5, or name the layer in exclude_modules",
        {"target_sparsity": 0.5},
    ),
    "neurons": (
        {"structure": "neuron", "target_sparsity": 0.995},
        r"which has 64 units \(neuron\): lower it to at most 0\.9843,",
        {"target_sparsity": 0.9843},
    ),
    "one block": (
        {"structure": "block", "block_shape": (32, 32), "target_sparsity": 0.7},
        r"leaves nothing of layer 'bert\.encoder\.layer\.0\.attention\.self\.query', which has 1 unit \(block of "
        r"32x32\): lower it to at most 0, take a smaller block_shape, or name",
        {"block_shape": (8, 8)},
    ),
    "few blocks": (
        {"structure": "block", "block_shape": (16, 16), "target_sparsity": 0.9},
        r"which has 4 units \(block of 16x16\): lower it to at most 0\.75,",
        {"target_sparsity": 0.75},
    ),
    "hybrid": (
        {"structure": "hybrid", "block_shape": (16, 32), "target_sparsity": 0.8},
        r"which has 2 units \(block of 16x32\): lower it to at most 0\.5, take a smaller block_shape",
        {"target_sparsity": 0.5},
    ),
    "weights": (
        {"target_sparsity": 0.9999},
        r"which has 1024 units \(weight\): lower it to at most 0\.999,",
        {"target_sparsity": 0.999},
    ),
    "all together": (
        {"structure": "head", "scope": "global", "target_sparsity": 0.8},
        r"leaves 1 of 4 units \(head\) in all, but 2 layers must keep 2 together .* lower it to at most 0\.5",
        {"target_sparsity": 0.5},
    ),
    "floors": (
        {"structure": "head", "scope": "global", "target_sparsity": 0.74, "min_layer_density": 0.1},
        r"leaves 1 of 4 units \(head\) in all, but 2 layers must keep 2 together \(min_layer_density=0\.1\)",
        {"target_sparsity": 0.5},
    ),
}


@pytest.mark.parametrize("case", UNREACHABLE)
def test_refused_before_anything_changes(case, model, dataset_factory, arguments, tokenizer, tmp_path):
    fields, message, mended = UNREACHABLE[case]
    with pytest.raises(ValueError, match=message) as raised:
        prune(
            model,
            SDPruneConfig(pruning_steps=4, distillation=None, **fields),
            dataset_factory(16),
            args=arguments(),
            processing_class=tokenizer,
        )
    assert "\n" not in str(raised.value)
    assert "allow_empty" not in str(raised.value)
    assert not masked_layers(model)
    assert list(tmp_path.iterdir()) == []
    config = SDPruneConfig(distillation=None, **(fields | mended))
    partition = mask_model(model, config)
    prune_step(model, config, config.target_sparsity, partition)
    assert masked_fraction(model) == pytest.approx(config.target_sparsity, abs=partition.tolerance(config) + 1e-3)


@pytest.mark.parametrize("structure", ["head", "neuron", "block", "unstructured"])
@pytest.mark.parametrize("scope", ["layer", "global"])
def test_whatever_is_let_through_is_reached(structure, scope, model_factory):
    """What a ranking of all would empty is found by ranking once, before anything is pruned."""
    for target in (0.1, 0.25, 0.49, 0.5, 0.51, 0.74, 0.75, 0.76, 0.9, 0.99):
        model = model_factory()
        config = SDPruneConfig(structure=structure, scope=scope, block_shape=(16, 16), target_sparsity=target)
        try:
            partition = mask_model(model, config)
        except ValueError as error:
            said = str(error)
            limit = re.search(r"at most ([\d.]+)", said)
            assert "min_layer_density" in said if limit is None else float(limit[1]) < target
            assert not masked_layers(model)
            continue
        prune_step(model, config, target, partition)
        assert masked_fraction(model) == pytest.approx(target, abs=partition.tolerance(config))


def test_a_layer_that_a_ranking_of_all_would_empty_comes_with_advice_that_exists(model):
    config = SDPruneConfig(scope="global")
    mask_model(model, config)
    with torch.no_grad():
        model.bert.encoder.layer[1].attention.self.key.weight.mul_(1e-6)
    message = r"lower target_sparsity, or set min_layer_density, the share of its units that every layer keeps"
    with pytest.raises(ValueError, match=message) as raised:
        prune_step(model, config, 0.5)
    assert "allow_empty" not in str(raised.value)
    unswap(model)
    with pytest.raises(ValueError, match=r"layer 'bert.*\.1\.attention\.self\.key' would lose all .* or set min_layer"):
        mask_model(model, config)
    assert not masked_layers(model)
