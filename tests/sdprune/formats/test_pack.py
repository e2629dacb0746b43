"""A weight in each form that a checkpoint stores, and the names of the forms."""

import json
from dataclasses import replace

import pytest
import torch

from sdp_kernels import BlockSparseMatrix
from sdprune.formats.form import Form
from sdprune.formats.pack import choose, digest, make_record, pack, quantize_rows, unpack

INT8 = ["dense-int8", "16x32-int8", "32x1-int8", "narrow-int8", "unstructured-int8"]


@pytest.mark.parametrize("precision", [None, "int8"])
@pytest.mark.parametrize("form", [Form("dense"), Form("narrow"), Form("unstructured"), Form("block", (128, 4))])
def test_a_form_has_one_name(form, precision):
    form = replace(form, precision=precision)
    assert Form.named(str(form)) == form


@pytest.mark.parametrize("name", ["", "odd", "32", "32x", "0x4", "4x0", "-4x4", "4x4x4", "block"])
def test_other_names_are_refused(name):
    with pytest.raises(ValueError, match=rf"choice must be 'dense', 'narrow' or a block shape .*, got {name!r}"):
        Form.named(name)


@pytest.mark.parametrize("shape", [(8,), (8, 0), "8x8", (8.0, 8), (True, 8), None, 8])
def test_blocks_have_two_sides(shape):
    with pytest.raises(ValueError, match="mine must be two whole numbers of at least 1, got"):
        Form.blocks(shape, "mine")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", ["16x32", "narrow", "unstructured", *INT8])
@pytest.mark.parametrize("shape", [(64, 64), (50, 70), (1, 33)])
@pytest.mark.parametrize("density", [0.0, 0.05, 1.0])
def test_packing_and_unpacking(name, shape, density, dtype):
    torch.manual_seed(1)
    weight = torch.randn(shape).to(dtype) * (torch.rand(shape) < density)
    form = Form.named(name)
    tensors = pack(weight, form)
    record = make_record(tensors, form, shape)
    assert record.form == form.stored
    if form.precision is not None:
        integers, scales = quantize_rows(weight)
        assert tensors["weight"].dtype == torch.int8
        assert tensors["scales"].dtype == torch.float32
        weight = integers * scales[:, None]
        again = pack(weight, form)  # the weight that any other tool computes with
        assert again.keys() == tensors.keys()
        assert all(torch.equal(again[part], value) for part, value in tensors.items())
    assert torch.equal(unpack(tensors, record), weight)
    assert type(record).from_dict(json.loads(json.dumps(record.to_dict())), "here") == record
    assert {name: tuple(value.shape) for name, value in tensors.items()} == record.shapes
    assert digest(tensors) != digest(tensors | {"weight": tensors["weight"] + 1}) or tensors["weight"].numel() == 0


def test_quantizing_what_was_quantized_changes_nothing():
    """Whatever the scales: products of scales and 127 are rounded, and quotients again."""
    generator = torch.Generator().manual_seed(0)
    many = torch.rand(2**18, 1, generator=generator) + 1.0  # one in 32 of the floats of an exponent
    for exponent in range(-44, 38):
        weight = torch.randn(200, 32, generator=generator) * 10.0**exponent
        weight[0], weight[1, 1:], weight[2] = 0.0, 0.0, 1e-45
        for given in (weight, weight.bfloat16(), *([many] if exponent == 0 else [])):
            integers, scales = quantize_rows(given)
            again = quantize_rows(integers * scales[:, None])
            assert torch.equal(again[0], integers)
            assert torch.equal(again[1], scales)
    integers, scales = quantize_rows(weight)
    matrix = BlockSparseMatrix.from_dense(weight, (32, 4)).quantize()
    assert torch.equal(matrix.to_dense(), integers * scales[:, None])
    assert torch.equal(matrix.scales[3:], scales[3:])


@pytest.mark.parametrize("value", [torch.inf, torch.nan])
def test_what_is_not_finite_has_no_scale(value):
    weight = torch.ones(4, 8)
    weight[2, 3] = value
    with pytest.raises(ValueError, match=r"values must be finite to be quantized|must not hold NaN"):
        pack(weight, Form.named("dense-int8"))


def test_what_is_chosen_in_int8():
    """By the bytes that it takes then: a mask of bits and the indices of blocks weigh more beside 8 bits than 32."""
    torch.manual_seed(0)
    weight = torch.randn(128, 128)
    chosen = {
        density: str(choose(weight * (torch.rand(128, 128) < density), precision="int8")) for density in (0.6, 0.8, 1.0)
    }
    assert chosen == {0.6: "unstructured-int8", 0.8: "dense-int8", 1.0: "dense-int8"}
    assert str(choose(weight * (torch.rand(128, 128) < 0.8))) == "unstructured"
    assert str(choose(weight * (torch.rand(128, 1) < 0.5), precision="int8")) == "narrow-int8"
    blocks = (torch.rand(4, 32) < 0.5).repeat_interleave(32, 0).repeat_interleave(4, 1)
    assert str(choose(weight * blocks, precision="int8")) == "32x4-int8"


@pytest.mark.parametrize("shape", [(16, 4), (32, 4), (32, 1)])
@pytest.mark.parametrize("precision", [None, "int8"])
def test_vectors_are_chosen(shape, precision):
    torch.manual_seed(0)
    grid = torch.rand(256 // shape[0], 256 // shape[1]) < 0.3
    kept = grid.repeat_interleave(shape[0], 0).repeat_interleave(shape[1], 1)
    assert choose(torch.randn(256, 256) * kept, precision=precision) == Form("block", shape, precision)


def test_what_is_chosen():
    torch.manual_seed(0)
    weight = torch.randn(128, 128)
    assert str(choose(weight)) == "dense"
    scattered = weight * (torch.rand(128, 128) < 0.1)
    assert str(choose(scattered)) == "unstructured"
    blocks = torch.eye(4).repeat_interleave(32, 0).repeat_interleave(32, 1)
    assert choose(weight * blocks) == Form("block", (32, 32))
    assert str(choose(weight * (torch.rand(128, 1) < 0.5))) == "narrow"
    assert str(choose(weight * (torch.arange(128) > 3))) == "dense"  # not worth it


@pytest.mark.parametrize(("removed", "shape"), [(None, (5, 4)), ("columns", (6, 4)), ("rows", (5, 8))])
def test_only_the_side_that_is_removed_is_narrowed(removed, shape):
    """An empty row stays where the layer loses columns, whose neighbours take and return rows of full size."""
    weight = torch.ones(6, 8)
    weight[2] = 0.0
    weight[:, ::2] = 0.0
    tensors = pack(weight, Form("narrow"), removed=removed)
    assert tuple(tensors["weight"].shape) == (len(tensors["rows"]), len(tensors["columns"])) == shape
