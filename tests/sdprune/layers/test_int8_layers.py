"""Layers in int8: in every form the numbers of one quantization, with scales in float32 whatever the model's dtype."""

import copy

import pytest
import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from sdprune import BlockSparseLinear
from sdprune.formats.form import Form
from sdprune.formats.pack import quantize_rows
from sdprune.layers.forms import in_form
from sdprune.layers.narrow import NarrowInt8Linear, NarrowLinear, RemovedInt8Linear, RemovedLinear

FORMS = ["dense-int8", "32x4-int8", "32x32-int8", "32x1-int8", "narrow-int8"]


def pruned(kind=nn.Linear, bias=True):
    """Return a layer of 50 outputs and 70 inputs with empty rows, columns and blocks."""
    torch.manual_seed(0)
    layer = nn.Linear(70, 50, bias) if kind is nn.Linear else Conv1D(50, 70)
    with torch.no_grad():
        weight = layer.weight if kind is nn.Linear else layer.weight.T
        weight[[1, 33]] = 0.0
        weight[:, [0, 5, 69]] = 0.0
        weight[:32, 32:64] = 0.0
    return layer


@pytest.mark.parametrize("kind", [nn.Linear, Conv1D])
@pytest.mark.parametrize("form", FORMS)
def test_every_form_holds_the_same_numbers(form, kind):
    linear = pruned(kind).eval()
    layer = in_form(linear, Form.named(form))
    assert isinstance(layer, NarrowInt8Linear if form == "narrow-int8" else BlockSparseLinear)
    assert not layer.training
    integers, scales = quantize_rows(linear.weight.detach() if kind is nn.Linear else linear.weight.detach().T)
    assert torch.equal(layer.dense_weight(), integers * scales[:, None])
    assert layer.weight.dtype == torch.int8
    assert layer.bias is linear.bias
    rows = torch.randn(2, 3, 70)
    expected = in_form(linear, Form.named("dense-int8"))(rows)
    torch.testing.assert_close(layer(rows), expected, rtol=1e-5, atol=0.03)  # other inputs, other steps
    assert (layer(rows) - linear(rows)).abs().max() < 0.03
    dense = layer.to_dense()
    assert type(dense) is kind
    assert dense.weight.requires_grad  # it can be trained again, unlike the integers
    again = in_form(dense, Form.named(form))
    assert {name: value.tolist() for name, value in again.state_dict().items()} == {
        name: value.tolist() for name, value in layer.state_dict().items()
    }


def removed(bias=True):
    weight = pruned(bias=bias)
    rows, columns = torch.arange(0, 50, 2, dtype=torch.int32), torch.arange(70, dtype=torch.int32)
    part = nn.Parameter(weight.weight.detach()[rows.long()])
    return RemovedLinear(part, weight.bias, rows, columns, (50, 70))


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("make", [lambda bias: NarrowLinear.from_linear(pruned(bias=bias)), removed], ids=["in", "out"])
def test_narrower_layers_are_quantized(make, bias):
    layer = make(bias)
    small = layer.quantize()
    assert isinstance(small, NarrowInt8Linear | RemovedInt8Linear)
    assert (small.in_features, small.out_features) == (layer.in_features, layer.out_features)
    assert small.density == layer.density
    rows = torch.randn(4, layer.in_features)
    assert 0.0 < (small(rows) - layer(rows)).abs().max() < 0.03
    assert not small.dense_weight()[layer.dense_weight() == 0].any()
    if bias:
        assert torch.equal(small.dense_bias(), layer.dense_bias())
    with pytest.raises(ValueError, match=r"weight must be floating-point to be quantized, got torch\.int8"):
        small.quantize()


def test_nothing_kept_stays_as_it_is():
    linear = nn.Linear(6, 4)
    with torch.no_grad():
        linear.weight.zero_()
    layer = NarrowLinear.from_linear(linear)
    assert layer.quantize() is layer
    assert torch.equal(in_form(linear, Form.named("narrow-int8"))(rows := torch.randn(2, 6)), linear(rows))


@pytest.mark.parametrize("form", FORMS)
def test_states_and_dtypes(form):
    linear = pruned()
    layer = in_form(linear, Form.named(form))
    rows = torch.randn(3, 70)
    expected = layer(rows)
    twin = copy.deepcopy(layer)
    half = twin.to(torch.bfloat16)
    assert half.weight.dtype == torch.int8
    scales = [value for name, value in half.named_buffers() if name.endswith("scales")]
    assert [value.dtype for value in scales] == [torch.float32]
    assert half.bias.dtype == half(rows.bfloat16()).dtype == torch.bfloat16
    assert torch.equal(half.dense_weight(), layer.dense_weight())
    other = pruned()
    with torch.no_grad():
        other.weight.mul_(2.0)
    other = in_form(other, Form.named(form))
    other.load_state_dict({name: value.clone() for name, value in layer.state_dict().items()})
    assert torch.equal(other(rows), expected)
    with torch.no_grad():
        linear.weight[:32, 64:68] = 0.0  # blocks that lost what they had
        linear.weight.mul_(2.0)
    layer.load_state_dict(linear.state_dict())  # dense, as `save_pretrained` writes it
    integers, scales = quantize_rows(linear.weight.detach())
    assert torch.equal(layer.dense_weight(), integers * scales[:, None])
    with torch.no_grad():
        linear.weight.add_(1.0)
    with pytest.raises(RuntimeError, match="weight has other empty"):
        layer.load_state_dict(linear.state_dict())


@pytest.mark.parametrize("form", ["dense", "unstructured", "unstructured-int8"])
def test_other_forms_are_refused(form):
    with pytest.raises(ValueError, match=f"form must be 'narrow' or blocks .* got '{form}'"):
        in_form(pruned(), Form.named(form))
