"""`MaskedLinear`, the swap and its inverse."""

import copy
from functools import partial

import pytest
import torch
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

from sdp_kernels import BitMask
from sdprune import MaskedLinear, SDPruneConfig
from sdprune.masking.layers import MaskedConv1D
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


@pytest.mark.parametrize("density", [0.25, 0.6])
@pytest.mark.parametrize("keep_pruned_values", [False, True])
def test_blocks_give_the_results_of_the_zeroed_dense_layer(density, keep_pruned_values):
    torch.manual_seed(0)
    linear = torch.nn.Linear(64, 96)
    layer = MaskedLinear.from_dense(copy.deepcopy(linear), block_shape=(16, 16), keep_pruned_values=keep_pruned_values)
    blocks = torch.arange(24).reshape(6, 4) * 7 % 24 < 24 * density
    layer.set_mask(BitMask.from_blocks(blocks, (16, 16), (96, 64)))
    rows = torch.randn(7, 64, requires_grad=True)
    assert layer._walks_blocks(rows) == (density == 0.25)
    mask = layer.bit_mask.to_bool()
    own_rows = rows.detach().clone().requires_grad_()
    weight = linear.weight.detach().masked_fill(~mask, 0.0).requires_grad_()
    expected = functional.linear(rows, weight, linear.bias)
    found = layer(own_rows)
    torch.testing.assert_close(found, expected)
    scale = torch.randn_like(expected)
    expected.mul(scale).sum().backward()
    found.mul(scale).sum().backward()
    torch.testing.assert_close(own_rows.grad, rows.grad)
    torch.testing.assert_close(layer.weight.grad, weight.grad.masked_fill(~mask, 0.0))
    assert bool((layer.weight.grad[~mask] == 0).all())
    if not keep_pruned_values:
        assert bool((layer.weight[~mask] == 0).all())


def test_lists_of_blocks_follow_a_loaded_mask_and_change_in_place():
    layer, other = (MaskedLinear(64, 64, block_shape=(16, 32)) for _ in range(2))
    places = [getattr(other, name).data_ptr() for name in ("mask", "crow_indices", "col_indices")]
    layer.set_mask(BitMask.from_blocks(torch.eye(4, 2, dtype=torch.bool), (16, 32), (64, 64)))
    assert set(layer.state_dict()) == {"weight", "bias", "mask"}
    other.load_state_dict(layer.state_dict())
    assert other.bit_mask.lists.crow_indices.tolist() == [0, 1, 2, 2, 2]
    assert other._walks_blocks(torch.ones(1, 64))
    assert [getattr(other, name).data_ptr() for name in ("mask", "crow_indices", "col_indices")] == places
    rows = torch.randn(3, 64)
    torch.testing.assert_close(other(rows), layer(rows))


@pytest.mark.parametrize("keep_pruned_values", [False, True])
def test_narrow_blocks_are_walked_along_too(keep_pruned_values):
    pytest.importorskip("numba")
    layer = MaskedLinear(40, 64, block_shape=(32, 1), keep_pruned_values=keep_pruned_values)
    rows = torch.randn(3, 40)
    assert not layer._walks_blocks(rows)
    layer.set_mask(BitMask.from_blocks(torch.arange(80).view(2, 40) % 5 == 0, (32, 1), (64, 40)))
    assert layer._walks_blocks(rows)
    assert set(layer.state_dict()) == {"weight", "bias", "mask"}
    expected = functional.linear(rows, torch.where(layer.bit_mask.to_bool(), layer.weight, 0), layer.bias)
    torch.testing.assert_close(layer(rows), expected)
    layer(rows).square().sum().backward()
    assert torch.equal(layer.weight.grad != 0, layer.bit_mask.to_bool())
    other = MaskedLinear(40, 64, block_shape=(32, 1), keep_pruned_values=keep_pruned_values)
    other.load_state_dict(layer.state_dict())
    assert other._walks_blocks(rows)


def test_autocast_and_half_precision_stay_dense_on_a_cpu():
    layer = MaskedLinear(64, 64, block_shape=(32, 32))
    layer.set_mask(BitMask.from_blocks(torch.tensor([[True, False], [False, False]]), (32, 32), (64, 64)))
    assert layer._walks_blocks(torch.ones(1, 64))
    assert not layer._walks_blocks(torch.ones(1, 64, dtype=torch.bfloat16))
    with torch.autocast("cpu", torch.bfloat16):
        assert not layer._walks_blocks(torch.ones(1, 64))
        assert layer(torch.ones(1, 64)).dtype is torch.bfloat16


def test_scores_travel_with_the_state():
    layer, other = MaskedLinear(8, 4), MaskedLinear(8, 4)
    layer.gather_scores()
    layer.score += torch.randn(4, 8)
    layer.score_steps += 3
    other.gather_scores()
    other.load_state_dict(layer.state_dict())
    assert torch.equal(other.score, layer.score)
    assert int(other.score_steps) == 3
    assert copy.deepcopy(layer).score is not None


def test_a_conv1d_by_hand():
    torch.manual_seed(0)
    layer = MaskedConv1D(6, 4)
    assert layer.weight.shape == (6, 4)
    mask = torch.rand(4, 6) > 0.5
    layer.set_mask(BitMask.from_bool(mask))
    assert torch.equal(layer.weight != 0, mask.T)
    rows = torch.randn(3, 6)
    torch.testing.assert_close(layer(rows), rows @ layer.weight + layer.bias)
    layer(rows).square().sum().backward()
    assert torch.equal(layer.weight.grad != 0, mask.T)


@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")  # torch's own compiler
def test_compiled_code_outlives_pruning_steps():
    layer = MaskedLinear(64, 64, block_shape=(16, 16))
    compiled = torch.compile(layer, backend="eager", fullgraph=True)
    rows = torch.randn(3, 64)
    torch._dynamo.reset()
    with torch._dynamo.config.patch(recompile_limit=2, fail_on_recompile_limit_hit=True):  # one to walk along blocks
        for kept in (16, 12, 10, 8, 4, 2):
            layer.set_mask(BitMask.from_blocks(torch.arange(16).view(4, 4) < kept, (16, 16), (64, 64)))
            torch.testing.assert_close(compiled(rows), functional.linear(rows, layer.weight, layer.bias))


def test_random_gates_are_the_same_when_checkpointing_runs_a_layer_twice():
    found = []
    for reentrant in (None, True, False):
        torch.manual_seed(0)
        layer = MaskedLinear(8, 8)
        layer.gather_scores(0.5, hard_concrete=True)
        rows = torch.randn(4, 8, requires_grad=True)
        run = layer if reentrant is None else partial(checkpoint, layer, use_reentrant=reentrant)
        output = run(rows)
        output.square().sum().backward()
        found.append((output.detach(), layer.weight.grad, layer.take_sensitivity()))
    for other in found[1:]:
        torch.testing.assert_close(other, found[0])
