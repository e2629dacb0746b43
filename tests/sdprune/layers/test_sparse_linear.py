"""Layers that skip what was pruned: equal to the dense ones, saved and loaded, compiled, trained, moved."""

import copy

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from torch.nn import functional
from transformers.pytorch_utils import Conv1D

from sdp_kernels import BitMask, use_backend
from sdprune import BlockSparseLinear, MaskedLinear
from sdprune.layers.narrow import NarrowLinear


def pruned_linear(out_features=48, in_features=64, block_shape=(16, 16), kept=0.4, bias=True, seed=0):
    """Return a dense layer of which about `kept` of the blocks are not zero, and their mask."""
    generator = torch.Generator().manual_seed(seed)
    height, width = block_shape
    grid = -(-out_features // height), -(-in_features // width)
    mask = (torch.rand(grid, generator=generator) < kept).repeat_interleave(height, 0).repeat_interleave(width, 1)
    linear = nn.Linear(in_features, out_features, bias)
    with torch.no_grad():
        linear.weight.mul_(mask[:out_features, :in_features])
    return linear


@pytest.mark.parametrize("block_shape", [(16, 16), (32, 16), (128, 32), (5, 7)], ids=str)
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("lead", [(), (0,), (3,), (2, 5)], ids=str)
def test_equals_the_dense_layer(block_shape, bias, lead):
    linear = pruned_linear(bias=bias)
    layer = BlockSparseLinear.from_linear(linear, block_shape)
    rows = torch.randn(*lead, 64)
    torch.testing.assert_close(layer(rows), linear(rows))
    with use_backend("reference"):
        torch.testing.assert_close(layer(rows), linear(rows))
    back = layer.to_linear()
    assert torch.equal(back.weight, linear.weight)
    assert back.bias is linear.bias
    assert layer.bias is linear.bias
    assert layer.density == layer.values.shape[0] / (-(-48 // block_shape[0]) * -(-64 // block_shape[1]))


@pytest.mark.parametrize("kept", [0.0, 1.0])
def test_nothing_and_everything_kept(kept):
    linear = pruned_linear(kept=kept)
    layer = BlockSparseLinear.from_linear(linear, (16, 16))
    assert layer.density == kept
    rows = torch.randn(4, 64)
    torch.testing.assert_close(layer(rows), linear(rows))


def test_a_mask_decides_what_is_kept():
    linear = nn.Linear(32, 32)
    mask = torch.zeros(32, 32, dtype=torch.bool)
    mask[:16, 16:] = True
    mask[20, 3] = True
    expected = functional.linear(rows := torch.randn(3, 32), linear.weight * mask, linear.bias)
    for given in (mask, BitMask.from_bool(mask)):
        layer = BlockSparseLinear.from_linear(linear, (16, 16), given)
        assert layer.density == 0.5
        torch.testing.assert_close(layer(rows), expected)
    masked = MaskedLinear.from_dense(linear, keep_pruned_values=True)
    masked.set_mask(BitMask.from_bool(mask))
    torch.testing.assert_close(BlockSparseLinear.from_linear(masked, (16, 16))(rows), expected)
    torch.testing.assert_close(NarrowLinear.from_linear(masked)(rows), expected)


def test_state_is_plain_tensors_and_loads_strictly(tmp_path):
    layer = BlockSparseLinear.from_linear(pruned_linear(), (16, 16))
    save_file(layer.state_dict(), tmp_path / "layer.safetensors")
    state = load_file(tmp_path / "layer.safetensors")
    assert set(state) == {"values", "crow_indices", "col_indices", "bias"}
    rows = torch.randn(5, 64, requires_grad=True)
    expected = layer(rows)
    (gradient,) = torch.autograd.grad(expected.sum(), rows)
    for device, assign in (("cpu", False), ("cpu", True), ("meta", True)):
        fresh = BlockSparseLinear(64, 48, (16, 16), state["values"].shape[0], device=device)
        fresh.load_state_dict(state, strict=True, assign=assign)
        result = fresh(rows)
        assert torch.equal(result, expected)
        (found,) = torch.autograd.grad(result.sum(), rows)  # walks along the lists of the columns
        assert torch.equal(found, gradient)
    with torch.device("meta"):
        fresh = BlockSparseLinear(64, 48, (16, 16), state["values"].shape[0])
    assert all(tensor.is_meta for tensor in (*fresh.parameters(), *fresh.buffers()))
    fresh.load_state_dict(state, assign=True)
    assert torch.equal(fresh(rows), expected)


def test_a_new_layer_is_valid():
    layer = BlockSparseLinear(64, 48, (16, 16), 6)
    layer.prepare()
    assert layer.density == 0.5
    assert torch.equal(layer(torch.randn(2, 64)), torch.zeros(2, 48))
    assert repr(layer) == (
        "BlockSparseLinear(in_features=64, out_features=48, bias=True, block_shape=(16, 16), density=0.5000)"
    )


def test_wrong_indices_are_refused_and_nothing_is_copied():
    model = nn.Sequential(BlockSparseLinear.from_linear(pruned_linear(kept=1.0), (16, 16)))
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    wrong = {
        "col_indices": (torch.full((12,), 9, dtype=torch.int32), "0: col_indices must be from 0 to 3, got 9"),
        "crow_indices": (torch.tensor([0, 8, 4, 12], dtype=torch.int32), "0: crow_indices must not decrease"),
        "values": (torch.zeros(11, 16, 16), r"size mismatch for 0.values: \(11, 16, 16\), this layer has \(12, 16"),
    }
    for name, (tensor, message) in wrong.items():
        with pytest.raises(RuntimeError, match=message):
            model.load_state_dict(before | {f"0.{name}": tensor})
        assert all(torch.equal(tensor, before[key]) for key, tensor in model.state_dict().items())
    model[0].col_indices.fill_(7)
    with pytest.raises(ValueError, match="col_indices must be from 0 to 3, got 7"):
        model[0].prepare()


def test_arguments_are_checked():
    with pytest.raises(ValueError, match="blocks must be from 0 to 12, the blocks of the weight, got 13"):
        BlockSparseLinear(64, 48, (16, 16), 13)
    for wrong in ((16,), (0, 16), "16x16", (16.0, 16)):
        with pytest.raises(ValueError, match="block_shape must be two whole numbers of at least 1, got"):
            BlockSparseLinear(64, 48, wrong, 1)
        with pytest.raises(ValueError, match="block_shape must be two whole numbers of at least 1, got"):
            BlockSparseLinear.from_linear(nn.Linear(4, 4), wrong)
    layer = BlockSparseLinear(64, 48, (16, 16), 1)
    with pytest.raises(ValueError, match=r"input must have shape \(..., 64\), got \(2, 48\)"):
        layer(torch.zeros(2, 48))


@pytest.mark.parametrize(
    "make", [lambda linear: BlockSparseLinear.from_linear(linear, (16, 16)), NarrowLinear.from_linear]
)
def test_gradients_are_those_of_the_dense_layer(make):
    linear = pruned_linear()
    with torch.no_grad():
        linear.weight[:16] = 0
        linear.weight[:, 16:32] = 0
    kept = linear.weight.detach() != 0
    layer = make(linear)
    rows, cotangent = torch.randn(6, 64, requires_grad=True), torch.randn(6, 48)
    expected = torch.autograd.grad((linear(rows) * cotangent).sum(), (rows, linear.weight, linear.bias))
    weights = layer.values if isinstance(layer, BlockSparseLinear) else layer.weight
    found = torch.autograd.grad((layer(rows) * cotangent).sum(), (rows, weights, layer.bias))
    torch.testing.assert_close(found[0], expected[0])
    torch.testing.assert_close(found[2], expected[2])
    with torch.no_grad():
        weights.copy_(found[1])
    torch.testing.assert_close(layer.to_linear().weight.detach()[kept], expected[1][kept])


@pytest.mark.parametrize(
    "make", [lambda linear: BlockSparseLinear.from_linear(linear, (16, 16)), NarrowLinear.from_linear]
)
def test_compiles_without_graph_breaks(make):
    linear = pruned_linear()
    with torch.no_grad():
        linear.weight[:16] = 0
    model = nn.Sequential(make(linear), nn.ReLU())
    rows = torch.randn(6, 64)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    with torch.inference_mode():
        torch.testing.assert_close(compiled(rows), linear(rows).relu())
    expected = torch.autograd.grad(model(rows).square().sum(), list(model.parameters()))
    found = torch.autograd.grad(compiled(rows).square().sum(), list(model.parameters()))
    torch.testing.assert_close(found, expected)


def test_copies_and_conversions():
    linear = pruned_linear()
    layer = BlockSparseLinear.from_linear(linear, (16, 16))
    twin = copy.deepcopy(layer)
    rows = torch.randn(3, 64)
    expected = layer(rows)
    with torch.no_grad():
        layer.values.zero_()
    assert torch.equal(twin(rows), expected)
    half = twin.to(torch.bfloat16)
    assert half.values.dtype == half.bias.dtype == torch.bfloat16
    assert half.crow_indices.dtype == half.col_indices.dtype == torch.int32
    torch.testing.assert_close(half(rows.bfloat16()).float(), expected, rtol=2e-2, atol=2e-2)
    assert all(tensor.is_meta for tensor in (*half.to("meta").parameters(), *half.buffers()))
    frozen = BlockSparseLinear.from_linear(linear.requires_grad_(False).eval(), (16, 16))
    assert not frozen.values.requires_grad
    assert not frozen.training
    assert not frozen.to_linear().weight.requires_grad


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("empty", ["rows", "columns", "both", "all", "none"])
def test_narrow_layers_equal_the_dense_ones(bias, empty):
    linear = nn.Linear(12, 10, bias)
    with torch.no_grad():
        if empty in ("rows", "both"):
            linear.weight[[1, 4, 9]] = 0
        if empty in ("columns", "both"):
            linear.weight[:, [0, 5]] = 0
        if empty == "all":
            linear.weight.zero_()
    layer = NarrowLinear.from_linear(linear)
    rows = torch.randn(2, 3, 12)
    torch.testing.assert_close(layer(rows), linear(rows))
    torch.testing.assert_close(layer(rows[0, 0]), linear(rows[0, 0]))
    assert torch.equal(layer.to_linear().weight, linear.weight)
    kept = {"rows": (7, 12), "columns": (10, 10), "both": (7, 10), "all": (0, 0), "none": (10, 12)}[empty]
    assert tuple(layer.weight.shape) == kept
    assert layer.density == pytest.approx(kept[0] * kept[1] / 120)
    assert f"kept={kept}" in repr(layer)


def test_a_square_transposed_layer_without_zeros_loads_its_own_state():
    """Its own weight and the dense one, which stands transposed, have the same shape."""
    torch.manual_seed(0)
    layer = NarrowLinear.from_linear(Conv1D(4, 4))
    weight = layer.weight.detach().clone()
    layer.load_state_dict(layer.state_dict())
    assert torch.equal(layer.weight, weight)
