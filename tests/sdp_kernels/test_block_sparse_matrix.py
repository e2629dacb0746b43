"""BlockSparseMatrix: packing, exchange, and what it refuses."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from sdp_kernels import BitMask, BlockSparseMatrix, block_sparse_linear

# torch calls its BSR layout a beta.
pytestmark = pytest.mark.filterwarnings("ignore:Sparse BSR tensor support is in beta:UserWarning")

BLOCK_SHAPES = [(16, 16), (32, 32), (128, 32), (16, 64), (3, 5)]
SHAPES = [(1, 1), (64, 96), (130, 70), (257, 31)]


def sparse_weight(shape: tuple[int, int], block_shape: tuple[int, int], density: float = 0.4) -> tuple[Tensor, Tensor]:
    """A weight and the mask of its blocks."""
    rows, columns = (-(-size // side) for size, side in zip(shape, block_shape, strict=True))
    kept = torch.rand(rows, columns) < density
    mask = kept.repeat_interleave(block_shape[0], 0).repeat_interleave(block_shape[1], 1)[: shape[0], : shape[1]]
    return torch.randn(shape), mask


def small(**changes: Any) -> BlockSparseMatrix:
    """Three blocks of 2 x 3 in a 4 x 9 matrix, with some fields changed."""
    arguments = {
        "values": torch.randn(3, 2, 3),
        "crow_indices": torch.tensor([0, 2, 3], dtype=torch.int32),
        "col_indices": torch.tensor([0, 2, 1], dtype=torch.int32),
        "shape": (4, 9),
        "block_shape": (2, 3),
    }
    return BlockSparseMatrix(**{**arguments, **changes})


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("block_shape", BLOCK_SHAPES)
def test_packing_keeps_every_kept_weight(shape: tuple[int, int], block_shape: tuple[int, int]) -> None:
    weight, mask = sparse_weight(shape, block_shape)
    expected = torch.where(mask, weight, 0)
    for matrix in (
        BlockSparseMatrix.from_dense(weight, block_shape, mask),
        BlockSparseMatrix.from_dense(weight, block_shape, BitMask.from_bool(mask)),
        BlockSparseMatrix.from_dense(expected, block_shape),
    ):
        assert torch.equal(matrix.to_dense(), expected)
        assert (matrix.shape, matrix.block_shape) == (shape, block_shape)
        assert matrix.density == matrix.values.shape[0] / (matrix.grid[0] * matrix.grid[1])


def test_a_block_that_the_mask_keeps_in_part_is_kept_and_its_pruned_weights_are_zero() -> None:
    weight = torch.full((4, 4), torch.nan)
    weight[1, 0] = 2.0
    mask = torch.zeros(4, 4, dtype=torch.bool)
    mask[1, 0] = True
    matrix = BlockSparseMatrix.from_dense(weight, (2, 2), mask)
    assert matrix.values.tolist() == [[[0.0, 0.0], [2.0, 0.0]]]
    assert matrix.density == 0.25


def test_a_block_of_zeros_is_kept_if_the_mask_keeps_it() -> None:
    zeros = torch.zeros(4, 4)
    assert BlockSparseMatrix.from_dense(zeros, (2, 2)).density == 0
    assert BlockSparseMatrix.from_dense(zeros, (2, 2), torch.ones(4, 4, dtype=torch.bool)).density == 1


def test_packing_copies_and_needs_no_gradient() -> None:
    weight = torch.nn.Parameter(torch.ones(4, 4))
    matrix = BlockSparseMatrix.from_dense(weight, (2, 4))
    with torch.no_grad():
        weight.zero_()
    assert (matrix.values == 1).all()
    assert not matrix.values.requires_grad


@pytest.mark.parametrize("density", [0.0, 0.3, 1.0])
def test_lists_of_block_columns_are_those_of_the_transposed_matrix(density: float) -> None:
    weight, mask = sparse_weight((70, 90), (8, 16), density)
    matrix = BlockSparseMatrix.from_dense(weight, (8, 16), mask)
    transposed = BlockSparseMatrix.from_dense(weight.T, (16, 8), mask.T)
    lists = matrix.lists
    assert torch.equal(lists.ccol_indices, transposed.crow_indices)
    assert torch.equal(lists.row_indices, transposed.col_indices)
    assert torch.equal(matrix.values[lists.positions].transpose(1, 2), transposed.values)
    assert torch.equal(lists.block_rows[lists.positions], lists.row_indices)
    assert all(getattr(lists, name).dtype == torch.int32 for name in vars(lists))
    for order, offsets in ((lists.row_order, matrix.crow_indices), (lists.column_order, lists.ccol_indices)):
        assert sorted(order.tolist()) == list(range(offsets.numel() - 1))
        assert (offsets.diff()[order].diff() <= 0).all()


@pytest.mark.parametrize("index_dtype", [torch.int32, torch.int64])
def test_exchange_with_torch(index_dtype: torch.dtype) -> None:
    weight, mask = sparse_weight((64, 96), (16, 32))
    matrix = BlockSparseMatrix.from_dense(weight, (16, 32), mask)
    bsr = matrix.to_torch_bsr()
    assert torch.equal(bsr.to_dense(), matrix.to_dense())
    other = torch.sparse_bsr_tensor(
        bsr.crow_indices().to(index_dtype),
        bsr.col_indices().to(index_dtype),
        bsr.values(),
        bsr.shape,
        check_invariants=True,
    )
    assert BlockSparseMatrix.from_torch_bsr(other).equal(matrix)


def test_what_bsr_cannot_express_is_refused() -> None:
    matrix = BlockSparseMatrix.from_dense(torch.randn(5, 4), (2, 2))
    with pytest.raises(ValueError, match=r"block_shape \(2, 2\) must divide the shape \(5, 4\)"):
        matrix.to_torch_bsr()
    with pytest.raises(
        ValueError, match=r"matrix must be a two-dimensional torch.sparse_bsr tensor, got torch.strided"
    ):
        BlockSparseMatrix.from_torch_bsr(torch.randn(4, 4))
    batch = torch.randn(2, 4, 4).to_sparse_bsr((2, 2))
    with pytest.raises(ValueError, match=r"two-dimensional .* shape \(2, 4, 4\)"):
        BlockSparseMatrix.from_torch_bsr(batch)


def test_dense_form_is_differentiable() -> None:
    matrix = small()
    values = matrix.values.double().requires_grad_()
    assert torch.autograd.gradcheck(lambda values: replace(matrix, values=values).to_dense(), values)


def test_equal_compares_all_fields() -> None:
    matrix = small(values=torch.ones(3, 2, 3))
    assert matrix.equal(small(values=torch.ones(3, 2, 3)))
    assert not matrix.equal(small(values=torch.zeros(3, 2, 3)))
    assert not matrix.equal(small(values=torch.ones(3, 2, 3), shape=(4, 8)))
    assert not matrix.equal(small(values=torch.ones(3, 2, 3), col_indices=torch.tensor([1, 2, 1], dtype=torch.int32)))
    assert not matrix.equal(matrix.to(torch.float64))


def test_moves_between_dtypes_and_devices() -> None:
    matrix = small()
    half = matrix.to(torch.float16)
    assert half.values.dtype == torch.float16
    assert half.crow_indices.dtype == torch.int32
    meta = matrix.to("meta", torch.float64)
    tensors = [meta.values, meta.crow_indices, meta.col_indices, *vars(meta.lists).values()]
    assert all(tensor.device.type == "meta" for tensor in tensors)
    assert meta.values.dtype == torch.float64
    with pytest.raises(ValueError, match=r"dtype must be a floating-point dtype, got torch.int8"):
        matrix.to(torch.int8)


def test_is_an_argument_of_an_exported_program() -> None:
    class Product(torch.nn.Module):
        def forward(self, rows: Tensor, matrix: BlockSparseMatrix) -> Tensor:
            return block_sparse_linear(rows, matrix)

    weight, rows = torch.randn(32, 48), torch.randn(3, 48)
    matrix = BlockSparseMatrix.from_dense(weight, (16, 16))
    exported = torch.export.export(Product(), (rows, matrix)).module()
    torch.testing.assert_close(exported(rows, matrix), rows @ weight.T, rtol=1e-5, atol=1e-4)


def test_is_a_pytree_of_its_tensors() -> None:
    matrix = small()
    leaves, structure = torch.utils._pytree.tree_flatten(matrix)
    tensors = [leaf for leaf in leaves if isinstance(leaf, Tensor)]
    assert len(tensors) == 3 + len(vars(matrix.lists))
    again = torch.utils._pytree.tree_unflatten(leaves, structure)
    assert again.equal(matrix)
    assert again.lists.positions is matrix.lists.positions


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"values": [1.0]}, "values must be a tensor, got list"),
        ({"values": torch.ones(3, 2, 3, dtype=torch.int32)}, "values must be a floating-point tensor, got torch.int32"),
        ({"values": torch.ones(3, 3, 2)}, r"values must have shape \(blocks, \*\(2, 3\)\), got \(3, 3, 2\)"),
        ({"values": torch.ones(2, 2, 3)}, r"col_indices must have shape \(2,\), got \(3,\)"),
        ({"crow_indices": torch.tensor([0, 2, 3])}, "crow_indices must be int32, got torch.int64"),
        ({"crow_indices": torch.tensor([0, 3], dtype=torch.int32)}, r"crow_indices must have shape \(3,\), got \(2,\)"),
        ({"crow_indices": torch.tensor([1, 2, 3], dtype=torch.int32)}, "crow_indices must begin with 0, got 1"),
        ({"crow_indices": torch.tensor([0, 2, 4], dtype=torch.int32)}, "crow_indices must end with .* 3, got 4"),
        ({"crow_indices": torch.tensor([0, 4, 3], dtype=torch.int32)}, "crow_indices must not decrease"),
        (
            {"crow_indices": torch.zeros(3, dtype=torch.int32, device="meta")},
            "crow_indices must be on .* cpu, got meta",
        ),
        ({"col_indices": torch.tensor([0.0, 2.0, 1.0])}, "col_indices must be int32, got torch.float32"),
        ({"col_indices": torch.tensor([0, 3, 1], dtype=torch.int32)}, "col_indices must be from 0 to 2, got 3"),
        ({"col_indices": torch.tensor([-1, 2, 1], dtype=torch.int32)}, "col_indices must be from 0 to 2, got -1"),
        ({"col_indices": torch.tensor([2, 0, 1], dtype=torch.int32)}, "col_indices must rise within each row"),
        ({"col_indices": torch.tensor([2, 2, 1], dtype=torch.int32)}, "col_indices must rise within each row"),
        ({"shape": (4, 9, 1)}, r"shape must be two whole numbers of at least 1, got \(4, 9, 1\)"),
        ({"shape": (4, 0)}, r"shape must be two whole numbers of at least 1, got \(4, 0\)"),
        ({"block_shape": (2, 3.0)}, r"block_shape must be two whole numbers of at least 1, got \(2, 3.0\)"),
    ],
)
def test_bad_fields(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        small(**changes)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"weight": torch.randn(4)}, ValueError, "weight must have 2 dimensions"),
        ({"weight": torch.ones(4, 4, dtype=torch.int64)}, TypeError, "weight must be a floating-point tensor"),
        ({"weight": torch.tensor([[1.0, torch.nan]])}, ValueError, "weight must not hold NaN"),
        ({"block_shape": (0, 2)}, ValueError, r"block_shape must be two whole numbers of at least 1, got \(0, 2\)"),
        ({"block_shape": 2}, ValueError, "block_shape must be two whole numbers of at least 1, got 2"),
        ({"mask": torch.ones(4, 4)}, TypeError, "mask must be a bool tensor or a BitMask, got torch.float32"),
        ({"mask": torch.ones(4, 5, dtype=torch.bool)}, ValueError, r"mask must have shape \(4, 4\), got \(4, 5\)"),
    ],
)
def test_bad_weights(arguments: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        BlockSparseMatrix.from_dense(**{"weight": torch.randn(4, 4), "block_shape": (2, 2), **arguments})
