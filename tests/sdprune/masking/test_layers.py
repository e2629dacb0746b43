"""`MaskedLinear`, the swap and its inverse."""

import copy

import pytest
import torch
from torch.nn import functional

from sdp_kernels import BitMask
from sdprune import MaskedLinear, SDPruneConfig
from sdprune.masking.pruner import mask_model, prune_step
from sdprune.masking.swap import masked_layers, unswap


def random_mask(layer: MaskedLinear, seed: int = 0) -> torch.Tensor:
    return torch.rand(layer.weight.shape, generator=torch.Generator().manual_seed(seed)) > 0.5


def test_swap_and_its_inverse_keep_logits_and_parameters(model, batch):
    before = model(**batch).logits
    parameters = dict(model.named_parameters())
    mask_model(model, SDPruneConfig())
    assert len(masked_layers(model)) == 12
    assert torch.equal(model(**batch).logits, before)
    assert all(parameter is parameters[name] for name, parameter in model.named_parameters())
    unswap(model)
    assert not masked_layers(model)
    assert torch.equal(model(**batch).logits, before)
    assert all(parameter is parameters[name] for name, parameter in model.named_parameters())
    assert list(dict(model.named_parameters())) == list(parameters)


@pytest.mark.parametrize("keep_pruned_values", [False, True])
@pytest.mark.parametrize("bias", [False, True])
def test_product_and_gradients_equal_those_of_the_zeroed_dense_layer(keep_pruned_values, bias):
    torch.manual_seed(0)
    linear = torch.nn.Linear(37, 19, bias=bias)
    layer = MaskedLinear.from_dense(copy.deepcopy(linear), keep_pruned_values=keep_pruned_values)
    mask = random_mask(layer)
    layer.set_mask(BitMask.from_bool(mask))
    rows = torch.randn(3, 5, 37, requires_grad=True)
    own_rows = rows.detach().clone().requires_grad_()
    weight = linear.weight.detach().masked_fill(~mask, 0.0).requires_grad_()
    expected = functional.linear(rows, weight, linear.bias)
    found = layer(own_rows)
    assert torch.equal(found, expected)
    scale = torch.randn_like(expected)
    expected.mul(scale).sum().backward()
    found.mul(scale).sum().backward()
    assert torch.equal(own_rows.grad, rows.grad)
    assert torch.equal(layer.weight.grad, weight.grad.masked_fill(~mask, 0.0))
    if bias:
        assert torch.equal(layer.bias.grad, linear.bias.grad)
    kept = layer.weight.detach()[~mask]
    assert bool((kept != 0).all()) if keep_pruned_values else bool((kept == 0).all())


def test_the_mask_travels_with_the_state():
    layer = MaskedLinear(40, 8)
    mask = random_mask(layer)
    layer.set_mask(BitMask.from_bool(mask))
    other = MaskedLinear(40, 8)
    other.load_state_dict(layer.state_dict())
    assert torch.equal(other.bit_mask.to_bool(), mask)
    assert other.mask.dtype is torch.int32
    assert layer.sparsity == pytest.approx(float((~mask).float().mean()))
    assert f"sparsity={layer.sparsity:.4f}" in repr(layer)


def test_to_dense_leaves_no_value_under_the_mask():
    layer = MaskedLinear(40, 8, keep_pruned_values=True)
    mask = random_mask(layer)
    layer.set_mask(BitMask.from_bool(mask))
    dense = layer.to_dense()
    assert type(dense) is torch.nn.Linear
    assert bool((dense.weight[~mask] == 0).all())
    assert bool((dense.weight[mask] != 0).all())


def test_autocast_follows_linear():
    layer = MaskedLinear(32, 16)
    with torch.autocast("cpu", torch.bfloat16):
        found = layer(torch.randn(4, 32))
    assert found.dtype is torch.bfloat16


def test_double_pruning_never_revives(model):
    config = SDPruneConfig()
    mask_model(model, config)
    prune_step(model, config, 0.5)
    first = {name: layer.bit_mask.to_bool() for name, layer in masked_layers(model).items()}
    with torch.no_grad():  # kept weights that happen to be zero must not make room for pruned ones
        for layer in masked_layers(model).values():
            layer.weight.mul_(torch.rand_like(layer.weight) > 0.3)
    prune_step(model, config, 0.6)
    for name, layer in masked_layers(model).items():
        assert not bool((layer.bit_mask.to_bool() & ~first[name]).any())
