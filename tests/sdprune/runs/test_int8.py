"""What is trained is what torchao deploys: the same rounding, with zeros that stay zeros."""

import pytest
import torch

from sdprune.config import SDPruneConfig
from sdprune.masking.pruner import mask_model, measure_sparsity, prune_step
from sdprune.masking.swap import masked_layers, unswap

pytest.importorskip("torchao", reason="needs torchao (the extra quantize)")

from sdprune.runs.quantized import QuantizationCallback, QuantizedMaskedLinear, quantize


@pytest.fixture
def pruned(model):
    config = SDPruneConfig(target_sparsity=0.75)
    mask_model(model, config)
    prune_step(model, config, 0.75)
    QuantizationCallback().on_init_end(None, None, None, model=model)
    return model


@torch.no_grad()
def test_training_computes_what_int8_computes(pruned):
    layers = masked_layers(pruned)
    assert all(isinstance(layer, QuantizedMaskedLinear) for layer in layers.values())
    inputs = {name: torch.randn(3, 5, layer.in_features) for name, layer in layers.items()}
    trained = {name: layer(inputs[name]) for name, layer in layers.items()}
    dense = unswap(pruned)
    int8 = quantize(dense, layers)
    assert measure_sparsity(dense, list(layers)).linear == 0.75
    for name in layers:
        deployed, plain = int8.get_submodule(name), dense.get_submodule(name)
        torch.testing.assert_close(deployed(inputs[name]), trained[name])
        assert (plain(inputs[name]) - trained[name]).abs().max() > 1e-3 * trained[name].abs().max()
        assert (deployed.weight.dequantize()[plain.weight == 0] == 0).all()


def test_gradients_pass_and_spare_the_zeros(pruned, batch):
    pruned(**batch).loss.backward()
    for layer in masked_layers(pruned).values():
        kept = layer.bit_mask.to_bool()
        assert (layer.weight.grad[~kept] == 0).all()
        assert (layer.weight.grad[kept] != 0).any()
