"""Layers that are laid out for their products: whatever changes their tensors, the next output follows."""

import copy
import pickle

import pytest
import torch
from torch import nn
from torch.nn import functional

from sdp_kernels import BlockSparseMatrix
from sdprune.layers.block_sparse import BlockSparseLinear

rows = torch.randn(20, 48, generator=torch.Generator().manual_seed(0))


def pruned_linear():
    linear = nn.Linear(48, 64)
    keep = torch.rand(2, 12) < 0.5
    linear.weight.data *= keep.repeat_interleave(32, 0).repeat_interleave(4, 1)
    return linear


@pytest.fixture
def layer():
    packed = BlockSparseLinear.from_linear(pruned_linear(), (32, 4)).pack()
    assert packed.values.transpose(1, 2).is_contiguous()
    with torch.no_grad():
        packed(rows)
    return packed


def assert_follows(layer):
    with torch.inference_mode():
        tensors = layer.values, layer.crow_indices, layer.col_indices  # as they are, whatever the layer remembers
        weight = BlockSparseMatrix(*tensors, layer.shape, layer.block_shape).to_dense()
        expected = functional.linear(rows, weight, layer.bias)
        torch.testing.assert_close(layer(rows), expected, rtol=1e-5, atol=1e-5)
        assert layer.matrix is layer.matrix, "made once"


def test_a_step_of_an_optimizer(layer):
    optimizer = torch.optim.AdamW(layer.parameters(), 0.1)
    layer(rows).square().sum().backward()
    optimizer.step()
    assert_follows(layer)


@pytest.mark.parametrize("assign", [False, True])
def test_a_state_that_is_loaded(layer, assign):
    state = {name: tensor.clone().contiguous() for name, tensor in layer.state_dict().items()}
    layer.load_state_dict(state | {"values": state["values"] * -2}, assign=assign)
    assert torch.equal(layer.values, state["values"] * -2)
    assert_follows(layer)


@pytest.mark.parametrize(
    "change",
    [
        lambda layer: layer.values.copy_(torch.randn_like(layer.values)),
        lambda layer: layer.values.data.mul_(3),
        lambda layer: layer.values.detach().zero_(),
        lambda layer: layer.bias.add_(1),
        lambda layer: setattr(layer.values, "data", layer.values.data * 2),
        lambda layer: setattr(layer, "values", nn.Parameter(layer.values.detach() * 2)),
        lambda layer: layer.to(torch.float64).to(torch.float32),
        lambda layer: layer.pack(),
    ],
)
def test_a_change_in_place(layer, change):
    with torch.no_grad():
        change(layer)
    assert_follows(layer)


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda layer: pickle.loads(pickle.dumps(layer))])
@pytest.mark.parametrize("quantized", [False, True])
def test_a_copy_has_weights_of_its_own(layer, copied, quantized):
    layer = layer.quantize().pack() if quantized else layer
    with torch.no_grad():
        expected = layer(rows)
        other = copied(layer)
        assert torch.equal(other(rows), expected)
        other.values.zero_()
        assert torch.equal(other(rows), layer.bias.expand(20, 64))
        assert torch.equal(layer(rows), expected)


def test_integers_and_scales_that_change(layer):
    layer = layer.quantize().pack()
    with torch.no_grad():
        before = layer(rows) - layer.bias
        layer.values.neg_()
        torch.testing.assert_close(layer(rows) - layer.bias, -before)
        layer.scales.mul_(2)
        torch.testing.assert_close(layer(rows) - layer.bias, -2 * before)
