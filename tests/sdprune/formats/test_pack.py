"""A weight in each form that a checkpoint stores, and the names of the forms."""

import json

import pytest
import torch

from sdprune.formats.form import Form
from sdprune.formats.pack import choose, digest, make_record, pack, unpack


@pytest.mark.parametrize("form", [Form("dense"), Form("narrow"), Form("unstructured"), Form("block", (128, 4))])
def test_a_form_has_one_name(form):
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
@pytest.mark.parametrize("name", ["16x32", "narrow", "unstructured"])
@pytest.mark.parametrize("shape", [(64, 64), (50, 70), (1, 33)])
@pytest.mark.parametrize("density", [0.0, 0.05, 1.0])
def test_packing_and_unpacking(name, shape, density, dtype):
    torch.manual_seed(1)
    weight = torch.randn(shape).to(dtype) * (torch.rand(shape) < density)
    form = Form.named(name)
    tensors = pack(weight, form)
    record = make_record(tensors, form, shape)
    assert record.form == form
    assert torch.equal(unpack(tensors, record), weight)
    assert type(record).from_dict(json.loads(json.dumps(record.to_dict())), "here") == record
    assert {name: tuple(value.shape) for name, value in tensors.items() if name != "weight"} == record.index_shapes
    assert digest(tensors) != digest(tensors | {"weight": tensors["weight"] + 1}) or tensors["weight"].numel() == 0


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
