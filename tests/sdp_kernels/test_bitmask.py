"""Packing of masks: exact for any shape, cheap to build, a pytree."""

import copy
import itertools
import re

import pytest
import torch
from torch.utils import _pytree as pytree

from sdp_kernels import BitMask, masked_linear, use_backend
from sdp_kernels.masked_linear import arguments
from sdp_kernels.masks import masking


@pytest.mark.parametrize("shape", [(1, 1), (3, 31), (2, 32), (5, 33), (7, 64), (4, 100), (1, 257), (0, 5), (3, 0)])
@pytest.mark.parametrize("density", [0.0, 0.3, 1.0])
def test_round_trip(shape: tuple[int, int], density: float) -> None:
    mask = torch.rand(shape) < density
    packed = BitMask.from_bool(mask)
    assert packed.words.dtype == torch.int32
    assert packed.words.shape == (shape[0], -(-shape[1] // 32))
    assert packed.shape == shape
    assert packed.nbytes == 4 * packed.words.numel()
    assert torch.equal(packed.to_bool(), mask)
    assert packed.sparsity == pytest.approx(1 - mask.double().mean().item() if mask.numel() else 0.0)


def test_layout_is_as_documented() -> None:
    """Bit j of word w is column 32 w + j, and the padding is 0."""
    mask = torch.rand(3, 70) < 0.5
    words = BitMask.from_bool(mask).words
    for row in range(3):
        for column in range(96):
            bit = (int(words[row, column // 32]) >> (column % 32)) & 1
            assert bit == (column < 70 and bool(mask[row, column]))


def test_strided_masks() -> None:
    mask = torch.rand(40, 9) < 0.5
    assert torch.equal(BitMask.from_bool(mask.T).to_bool(), mask.T)
    packed = BitMask.from_bool(mask)
    strided = BitMask(packed.words.T.contiguous().T, packed.shape)
    assert torch.equal(strided.to_bool(), mask)


def test_blocks() -> None:
    grid = torch.rand(3, 5) < 0.5
    packed = BitMask.from_blocks(grid, (4, 14), (12, 70))
    dense = grid.repeat_interleave(4, 0).repeat_interleave(14, 1)
    assert torch.equal(packed.to_bool(), dense)
    assert torch.equal(packed.to_blocks(), grid)
    assert packed.block_shape == (4, 14)
    again = BitMask.from_bool(dense, block_shape=(4, 14))
    assert again.block_shape == (4, 14)
    assert again.equal(packed)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float8_e5m2])
@pytest.mark.parametrize("shape", [(3, 31), (5, 64), (2, 100), (0, 5)])
def test_words_mask_as_bools_do(shape: tuple[int, int], dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """Exact zeros in NaN, in several chunks, and the same layout of memory in a copy."""
    monkeypatch.setattr(masking, "CHUNK_ELEMENTS", 2 * shape[1])
    keep = torch.rand(shape) < 0.5
    weight = torch.where(keep, torch.randn(shape), torch.nan).to(dtype).T.contiguous().T
    expected = torch.where(keep, weight.double(), 0)
    for mask in (keep, BitMask.from_bool(keep).words):
        copy = masking.masked(weight, mask)
        assert torch.equal(copy.double(), expected)
        assert copy.stride() == weight.stride()
        masking.mask_(changed := weight.clone(), mask)
        assert torch.equal(changed.double(), expected)


@pytest.mark.parametrize("columns", [1, 31, 32, 33, 64])
def test_sees_whether_everything_is_kept(columns: int) -> None:
    """The bits past the last column do not count; a device is not asked."""
    keep, weight = torch.ones(3, columns, dtype=torch.bool), torch.ones(3, columns)
    assert masking.keeps_everything(keep, weight)
    assert masking.keeps_everything(BitMask.from_bool(keep).words, weight)
    assert not masking.keeps_everything(keep.to("meta"), weight.to("meta"))
    keep[2, -1] = False
    assert not masking.keeps_everything(keep, weight)
    assert not masking.keeps_everything(BitMask.from_bool(keep).words, weight)


def test_equal_compares_shape_and_bits() -> None:
    mask = torch.rand(4, 40) < 0.5
    packed = BitMask.from_bool(mask)
    assert packed.equal(BitMask.from_bool(mask.clone()))
    assert not packed.equal(BitMask.from_bool(~mask))
    assert not BitMask.from_bool(torch.ones(1, 3).bool()).equal(BitMask.from_bool(torch.tensor([[1, 1, 1, 0]]).bool()))
    assert packed.to("cpu").equal(packed)
    assert copy.deepcopy(packed).equal(packed)


def test_is_a_pytree_of_its_words() -> None:
    packed = BitMask.from_blocks(torch.eye(2).bool(), (2, 3), (4, 6))
    leaves, structure = pytree.tree_flatten(packed)
    assert any(leaf is packed.words for leaf in leaves)
    rebuilt = pytree.tree_unflatten(leaves, structure)
    assert isinstance(rebuilt, BitMask)
    assert rebuilt.equal(packed)
    assert rebuilt.block_shape == packed.block_shape


def test_unpacking_is_registered_rightly() -> None:
    words = BitMask.from_bool(torch.rand(3, 40) < 0.5).words
    torch.library.opcheck(torch.ops.sdp_kernels.unpack_bits, (words, 40))


def test_unpacks_inside_compiled_code() -> None:
    packed = BitMask.from_bool(torch.rand(3, 40) < 0.5)
    count = torch.compile(lambda mask: mask.to_bool().sum(), fullgraph=True, backend="aot_eager")
    assert count(packed) == packed.to_bool().sum()


def test_bad_arguments() -> None:
    with pytest.raises(TypeError, match=r"mask must be a bool tensor, got torch\.float32"):
        BitMask.from_bool(torch.ones(2, 2))
    with pytest.raises(ValueError, match=r"mask must have 2 dimensions, got shape \(2,\)"):
        BitMask.from_bool(torch.ones(2).bool())
    with pytest.raises(ValueError, match=r"block_shape \(3, 2\) must divide the shape \(4, 4\)"):
        BitMask.from_bool(torch.ones(4, 4).bool(), block_shape=(3, 2))
    with pytest.raises(ValueError, match=r"keep or prune blocks of shape \(2, 2\) as a whole"):
        BitMask.from_bool(torch.eye(4).bool(), block_shape=(2, 2))
    with pytest.raises(ValueError, match=r"blocks must have shape \(2, 2\), got \(3, 2\)"):
        BitMask.from_blocks(torch.ones(3, 2).bool(), (2, 2), (4, 4))
    with pytest.raises(ValueError, match="block_shape is None"):
        BitMask.from_bool(torch.ones(4, 4).bool()).to_blocks()
    with pytest.raises(TypeError, match=r"blocks must be a bool tensor, got torch\.float32"):
        BitMask.from_blocks(torch.full((2, 2), torch.nan), (2, 2), (4, 4))
    for block_shape in (2, (2,), (2.0, 2)):
        with pytest.raises(
            ValueError, match=r"block_shape must be two whole numbers .*, got " + re.escape(repr(block_shape))
        ):
            BitMask.from_bool(torch.ones(4, 4).bool(), block_shape=block_shape)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"words must be int32, got torch\.float32"):
        BitMask(torch.ones(4, 1), (4, 4))
    with pytest.raises(ValueError, match=r"words of a mask of shape \(4, 40\) must have shape \(4, 2\), got \(4, 1\)"):
        BitMask(torch.ones(4, 1).int(), (4, 40))


@pytest.mark.parametrize("density", [0.0, 0.3, 1.0])
def test_lists_of_blocks(density: float) -> None:
    """Rows in order and columns in order, with room for all blocks, from either constructor."""
    grid = torch.rand(4, 7) < density
    packed = BitMask.from_blocks(grid, (16, 32), (64, 224))
    assert packed.lists is not None
    for keep, offsets, neighbours in (
        (grid, packed.lists.crow_indices, packed.lists.col_indices),
        (grid.T, packed.lists.ccol_indices, packed.lists.row_indices),
    ):
        assert offsets.dtype == neighbours.dtype == torch.int32
        assert neighbours.numel() == grid.numel()
        assert offsets[0] == 0
        assert offsets[-1] == grid.sum()
        for line, (start, end) in enumerate(itertools.pairwise(offsets.tolist())):
            assert neighbours[start:end].tolist() == keep[line].nonzero()[:, 0].tolist()
    again = BitMask.from_bool(packed.to_bool(), block_shape=(16, 32))
    assert again.lists is not None
    assert torch.equal(again.lists.col_indices, packed.lists.col_indices)
    assert packed.nbytes == 4 * packed.words.numel() + 4 * (5 + 8 + 2 * 28)
    assert packed.to("cpu").lists is not None


def test_small_blocks_have_no_lists() -> None:
    assert BitMask.from_blocks(torch.eye(2).bool(), (8, 32), (16, 64)).lists is None
    assert BitMask.from_bool(torch.ones(16, 16).bool()).lists is None


def test_copy_in_place() -> None:
    first, second = (BitMask.from_blocks(torch.rand(4, 7) < 0.5, (16, 16), (64, 112)) for _ in range(2))
    assert first.lists is not None
    assert second.lists is not None
    places = [first.words.data_ptr(), first.lists.col_indices.data_ptr()]
    first.copy_(second)
    assert first.equal(second)
    assert torch.equal(first.lists.row_indices, second.lists.row_indices)
    assert [first.words.data_ptr(), first.lists.col_indices.data_ptr()] == places
    with pytest.raises(ValueError, match=r"other must have block_shape \(16, 16\), got None"):
        first.copy_(BitMask.from_bool(second.to_bool()))
    with pytest.raises(ValueError, match="other must have lists if and only if this mask has"):
        first.copy_(BitMask(second.words, second.shape, second.block_shape))


@pytest.mark.parametrize(("side", "kept", "expected"), [(16, 1, False), (16, 2, True), (64, 3, False), (64, 4, True)])
def test_knows_whether_lists_are_worthwhile(side: int, kept: int, expected: bool) -> None:
    """As the caller says, or as a bool mask shows; copying another mask in place keeps the products as they are."""
    keep = torch.arange(10).view(2, 5) < kept
    shape = (2 * side, 5 * side)
    told = BitMask.from_blocks(keep, (side, side), shape, density=kept / 10)
    seen = BitMask.from_bool(told.to_bool(), block_shape=(side, side))
    assert (told.mostly_kept, seen.mostly_kept) == (expected, expected)
    assert told.to("cpu").mostly_kept == expected
    assert not BitMask.from_blocks(keep, (side, side), shape).mostly_kept
    full = BitMask.from_blocks(torch.ones(2, 5).bool(), (side, side), shape, density=1.0)
    told.copy_(full)
    assert told.equal(full)
    assert told.mostly_kept == expected


def test_a_mask_mostly_kept_is_multiplied_densely(
    device: torch.device, triton_backend: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where tokens are many; few walk along the kept blocks all the same."""
    from sdp_kernels.masked_linear import kernel

    walks: list[int] = []
    product = kernel.blocks_product
    monkeypatch.setattr(kernel, "blocks_product", lambda *args: walks.append(1) or product(*args))
    monkeypatch.setattr(arguments, "FEW_TOKENS", 4)
    keep = torch.tensor([[True, False], [True, True]])
    mask = BitMask.from_blocks(keep, (16, 16), (32, 32), density=0.75).to(device)
    for tokens, expected in ((4, 2), (5, 0)):
        walks.clear()
        input = torch.randn(tokens, 32, device=device, requires_grad=True)
        weight = torch.randn(32, 32, device=device, requires_grad=True)
        with use_backend(triton_backend):
            output = masked_linear(input, weight, mask)
        dense = torch.nn.functional.linear(input, torch.where(mask.to_bool(), weight, 0))
        torch.testing.assert_close(output, dense, rtol=1e-4, atol=1e-4)
        gradients = torch.autograd.grad(output.sum(), (input, weight))
        for got, want in zip(gradients, torch.autograd.grad(dense.sum(), (input, weight)), strict=True):
            torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)
        assert len(walks) == expected
