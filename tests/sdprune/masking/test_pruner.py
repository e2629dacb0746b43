"""A pruning step: exact counts, the smallest weights, whole blocks."""

import pytest
import torch

from sdprune import SDPruneConfig
from sdprune.masking.pruner import mask_model, masked_fraction, measure_sparsity, prune_step
from sdprune.masking.swap import masked_layers


@pytest.mark.parametrize("sparsity", [0.0, 0.1234, 0.5, 0.987])
def test_every_layer_reaches_the_target_to_one_weight(model, sparsity):
    config = SDPruneConfig(target_sparsity=sparsity)
    mask_model(model, config)
    prune_step(model, config, sparsity)
    for layer in masked_layers(model).values():
        zeros = int((layer.weight == 0).sum())
        assert abs(zeros - sparsity * layer.weight.numel()) <= 0.5
        kept, pruned = (layer.weight.abs()[mask] for mask in (layer.bit_mask.to_bool(), ~layer.bit_mask.to_bool()))
        assert bool((pruned == 0).all())
        assert kept.min() > 0


def test_the_smallest_weights_go(model):
    config = SDPruneConfig()
    weights = {
        name: module.weight.detach().clone() for name, module in model.named_modules() if hasattr(module, "weight")
    }
    mask_model(model, config)
    prune_step(model, config, 0.5)
    for name, layer in masked_layers(model).items():
        mask = layer.bit_mask.to_bool()
        assert weights[name].abs()[mask].min() >= weights[name].abs()[~mask].max()


@pytest.mark.parametrize("structure", ["unstructured", "block"])
def test_global_scope_reaches_the_target_in_total(model, structure):
    config = SDPruneConfig(scope="global", structure=structure, block_shape=(8, 16))
    mask_model(model, config)
    with torch.no_grad():  # layers of different scale end at different sparsities
        for index, layer in enumerate(masked_layers(model).values()):
            layer.weight.mul_(1.0 + 0.005 * index)
    prune_step(model, config, 0.7)
    found = measure_sparsity(model)
    unit = 1 if structure == "unstructured" else 8 * 16
    assert abs(found.zeros - 0.7 * found.prunable) <= unit / 2
    assert max(found.layers.values()) - min(found.layers.values()) > 0.01


def test_blocks_are_whole_and_exact(model):
    config = SDPruneConfig(structure="block", block_shape=(8, 16))
    mask_model(model, config)
    prune_step(model, config, 0.6)
    for layer in masked_layers(model).values():
        rows, columns = layer.weight.shape
        blocks = layer.weight.detach().reshape(rows // 8, 8, columns // 16, 16).transpose(1, 2).reshape(-1, 128)
        zero = (blocks == 0).all(1)
        assert bool(((blocks != 0).all(1) | zero).all())
        assert abs(int(zero.sum()) - 0.6 * len(blocks)) <= 0.5


def test_a_block_that_does_not_divide_names_the_layer(model):
    with pytest.raises(
        ValueError, match=r"block_shape \(48, 32\).*layer\.0\.attention\.self\.query' of shape \(32, 32\)"
    ):
        mask_model(model, SDPruneConfig(structure="block", block_shape=(48, 32)))
    assert not masked_layers(model)


def test_measured_and_promised_sparsity(model):
    config = SDPruneConfig()
    mask_model(model, config)
    prune_step(model, config, 0.25)
    found = measure_sparsity(model)
    assert masked_fraction(model) == pytest.approx(found.linear) == pytest.approx(0.25)
    assert found.parameters == sum(parameter.numel() for parameter in model.parameters())
    assert found.model == found.zeros / found.parameters < found.linear
    assert len(found.layers) == 12


def test_a_layer_that_would_vanish_is_named(model):
    config = SDPruneConfig(scope="global")
    mask_model(model, config)
    with torch.no_grad():
        model.bert.encoder.layer[1].attention.self.key.weight.mul_(1e-6)
    with pytest.raises(ValueError, match=r"layer 'bert\.encoder\.layer\.1\.attention\.self\.key' would lose all"):
        prune_step(model, config, 0.5)
    assert masked_fraction(model) == 0.0


def test_weights_that_are_not_numbers_are_named(model):
    mask_model(model, SDPruneConfig())
    with torch.no_grad():
        model.bert.encoder.layer[0].output.dense.weight[3, 3] = torch.nan
    with pytest.raises(ValueError, match=r"layer 'bert\.encoder\.layer\.0\.output\.dense' .*NaN"):
        prune_step(model, SDPruneConfig(), 0.5)


def test_masks_of_a_run_that_was_refused_are_forgotten(model, batch):
    before = model(**batch).logits
    for fields in ({"structure": "block", "block_shape": (16, 16)}, {"criterion": "l0", "start_ratio": 0.1}, {}):
        mask_model(model, SDPruneConfig(**fields))
    assert all(layer.block_shape is None and layer.score is None for layer in masked_layers(model).values())
    assert torch.equal(model(**batch).logits, before)


def test_other_blocks_than_those_of_the_masks_are_refused(model):
    mask_model(model, SDPruneConfig())
    prune_step(model, SDPruneConfig(), 0.5)
    with pytest.raises(ValueError, match=r"layer 'bert.*' is pruned already, under a mask of blocks None, not of \(16"):
        mask_model(model, SDPruneConfig(structure="block", block_shape=(16, 16)))
