"""From scores to masks: which weights, blocks or rows to keep.

The threshold is found by counting the digits of the scores (radix select) instead of sorting them. It is exact, also
over many matrices together, and needs memory for one chunk and the counts only. Counts are integers, so the order in
which programs add theirs does not change the result, and position settles ties. On a GPU the state of the search stays
on the device: the host waits only to refuse NaN and empty masks. Masks are written as words, never as bools.
"""

from collections.abc import Sequence
from numbers import Real
from typing import Literal, TypedDict, Unpack, overload

import torch
from torch import Tensor

from sdp_kernels.checks import check_choice, check_floating
from sdp_kernels.dispatch import OFFERS, choose_backend, is_captured
from sdp_kernels.mask_selection.packing import holds_nan, keep_highest, keep_n_of_m
from sdp_kernels.masks import BitMask, block_grid, unpack_bits

STRUCTURES = ("unstructured", "block", "n:m", "row")
REDUCTIONS = ("sum", "mean", "max")

Structure = Literal["unstructured", "block", "n:m", "row"]
Reduction = Literal["sum", "mean", "max"]
Scope = Literal["tensor", "global"]


class SelectionOptions(TypedDict, total=False):
    """The options of `select_mask`, for its two signatures."""

    structure: Structure
    block_shape: tuple[int, int] | None
    block_reduction: Reduction
    n: int | None
    m: int | None
    scope: Scope
    allow_empty: bool


@overload
def select_mask(scores: Tensor, sparsity: float | None = None, **options: Unpack[SelectionOptions]) -> BitMask: ...


@overload
def select_mask(
    scores: Sequence[Tensor], sparsity: float | None = None, **options: Unpack[SelectionOptions]
) -> list[BitMask]: ...


@torch.no_grad()
def select_mask(
    scores: Tensor | Sequence[Tensor],
    sparsity: float | None = None,
    *,
    structure: Structure = "unstructured",
    block_shape: tuple[int, int] | None = None,
    block_reduction: Reduction = "sum",
    n: int | None = None,
    m: int | None = None,
    scope: Scope = "tensor",
    allow_empty: bool = False,
) -> BitMask | list[BitMask]:
    """Keep the units with the highest scores.

    A unit is a weight, a block, or a row. Exactly `round(sparsity * units)` of them are pruned (Python's
    rounding: halves go to the even number), of each tensor or, with `scope="global"`, of all together. Of
    equal scores the later one is pruned first, in the order of the list and then row by row, so the result
    never varies. With "n:m", n of every m neighbours along a row are kept instead.

    Args:
        scores: a matrix or a sequence of matrices, any float dtype; higher is more important. -inf is
            pruned first.
        sparsity: fraction to prune, in [0, 1); None for "n:m" and only then.
        structure: "unstructured", "block", "n:m" or "row".
        block_shape: (rows, columns) of a block; must divide every matrix. For "block" and only then.
        block_reduction: score of a block or row from those of its weights: "sum", "mean" or "max".
        n: how many of `m` to keep. For "n:m" and only then.
        m: length of a group; must divide the number of columns. For "n:m" and only then.
        scope: "tensor" ranks each matrix by itself, "global" ranks all units together.
        allow_empty: whether a matrix may lose all its units.

    Returns:
        A `BitMask`, or a list of them for a sequence. Blocks and rows set its `block_shape`.

    Raises:
        ValueError: an argument out of range, missing, or not for this structure; shapes that do not divide; a
            NaN score; a matrix that would lose everything. Names the matrix by its index.
        TypeError: scores are not floating-point tensors.
        RuntimeError: inside the capture of a CUDA graph, because the device is waited for.

    Example:
        >>> select_mask(torch.tensor([[4.0, 1.0], [3.0, 2.0]]), 0.5).to_bool()
        tensor([[ True, False],
                [ True, False]])
    """
    matrices = [scores] if isinstance(scores, Tensor) else list(scores)
    check_choice("structure", structure, STRUCTURES)
    check_choice("block_reduction", block_reduction, REDUCTIONS)
    check_choice("scope", scope, ("tensor", "global"))
    _check_matrices(matrices)
    if not matrices:
        return []
    devices = sorted({str(matrix.device) for matrix in matrices})
    apart = [f"scores are on several devices, {devices}"] if len(devices) > 1 else []
    backend = choose_backend("select_mask", matrices, OFFERS, apart)
    if any(map(is_captured, matrices)):
        raise RuntimeError("select_mask waits for its device, to refuse NaN and empty masks: no CUDA graph can hold it")
    if structure == "n:m":
        if sparsity is not None or block_shape is not None:
            raise ValueError(f"n:m takes no sparsity and no block_shape, got {sparsity} and {block_shape}")
        kept = _n_of_m_words(matrices, n, m, backend)
        masks = [BitMask(words, (each.shape[0], each.shape[1])) for words, each in zip(kept, matrices, strict=True)]
    else:
        if n is not None or m is not None:
            raise ValueError(f"n and m are for structure 'n:m', got n={n}, m={m} with {structure!r}")
        fraction = _checked_sparsity(sparsity)
        units = [_units(i, s, structure, block_shape, block_reduction) for i, s in enumerate(matrices)]
        kept = _highest_words(matrices, units, fraction, scope == "global", allow_empty, backend)
        masks = [
            _mask_of(*each, structure, block_shape, 1 - fraction) for each in zip(kept, units, matrices, strict=True)
        ]
    return masks[0] if isinstance(scores, Tensor) else masks


def pruned_count(sparsity: float, units: int) -> int:
    """Return how many of `units` are pruned at a sparsity: the nearest number, the even one of two."""
    return round(sparsity * units)


def _check_matrices(matrices: list[Tensor]) -> None:
    for index, matrix in enumerate(matrices):
        check_floating(f"scores[{index}]", matrix)
        if matrix.dim() != 2 or matrix.numel() == 0:
            raise ValueError(f"scores[{index}] must be a matrix with entries, got shape {tuple(matrix.shape)}")


def _checked_sparsity(sparsity: object) -> float:
    if isinstance(sparsity, Real) and 0 <= float(sparsity) < 1:
        return float(sparsity)
    raise ValueError(f"sparsity must be in [0, 1), got {sparsity!r}")


def _refuse_nan(index: int, matrix: Tensor) -> None:
    if holds_nan(matrix):
        raise ValueError(f"scores[{index}] of shape {tuple(matrix.shape)} holds NaN")
    raise ValueError(f"scores[{index}] holds +inf and -inf in one block, whose sum is NaN")


def _refuse_empty(index: int, units: Tensor, sparsity: float) -> None:
    raise ValueError(
        f"scores[{index}] would lose all its {units.numel()} units at sparsity {sparsity}; "
        f"lower it or pass allow_empty=True"
    )


def _units(
    index: int, matrix: Tensor, structure: Structure, block_shape: tuple[int, int] | None, reduction: Reduction
) -> Tensor:
    """The scores of the units, as a matrix."""
    if (block_shape is not None) != (structure == "block"):
        raise ValueError(f"block_shape is for structure 'block', got {block_shape} with {structure!r}")
    if structure == "unstructured":
        return matrix
    shape = block_shape or (1, matrix.shape[1])
    try:
        rows, columns = block_grid(matrix.shape, shape)
    except ValueError as error:
        raise ValueError(f"scores[{index}]: {error}") from None
    blocks = matrix.reshape(rows, shape[0], columns, shape[1])
    if reduction == "max":
        return blocks.amax((1, 3))
    units = blocks.sum((1, 3), dtype=None if matrix.dtype == torch.float64 else torch.float32)
    return units / (shape[0] * shape[1]) if reduction == "mean" else units


def _highest_words(
    matrices: list[Tensor], units: list[Tensor], sparsity: float, together: bool, allow_empty: bool, backend: str
) -> list[Tensor]:
    """The words of the masks of the units, ranked all together or each matrix by itself."""
    groups = [list(range(len(units)))] if together else [[index] for index in range(len(units))]
    pruned = [pruned_count(sparsity, sum(units[index].numel() for index in group)) for group in groups]
    if backend == "triton":
        from sdp_kernels.mask_selection.kernel import keep_highest as keep_highest_triton

        words, unordered = keep_highest_triton(units, groups, pruned)
    else:
        unordered = [holds_nan(each) for each in units]
    for index, nan in enumerate(unordered):
        if nan:
            _refuse_nan(index, matrices[index])
    if backend != "triton":
        words = [
            kept
            for group, number in zip(groups, pruned, strict=True)
            for kept in keep_highest([units[index] for index in group], number)
        ]
    if not allow_empty:
        for index, full in enumerate(torch.stack([kept.any().to(words[0].device) for kept in words]).tolist()):
            if not full:
                _refuse_empty(index, units[index], sparsity)
    return words


def _n_of_m_words(matrices: list[Tensor], n: int | None, m: int | None, backend: str) -> list[Tensor]:
    if not (isinstance(n, int) and isinstance(m, int) and 0 < n <= m):
        raise ValueError(f"n:m needs whole numbers 0 < n <= m, got n={n}, m={m}")
    for index, matrix in enumerate(matrices):
        if matrix.shape[1] % m:
            raise ValueError(f"scores[{index}]: m={m} must divide the columns of shape {tuple(matrix.shape)}")
        if holds_nan(matrix):
            _refuse_nan(index, matrix)
    if backend == "triton":
        from sdp_kernels.mask_selection.kernel import keep_n_of_m as keep_n_of_m_triton

        return [keep_n_of_m_triton(matrix, n, m) for matrix in matrices]
    return [keep_n_of_m(matrix, n, m) for matrix in matrices]


def _mask_of(
    words: Tensor,
    units: Tensor,
    matrix: Tensor,
    structure: Structure,
    block_shape: tuple[int, int] | None,
    density: float,
) -> BitMask:
    shape = (matrix.shape[0], matrix.shape[1])
    if structure == "unstructured":
        return BitMask(words, shape)
    keep = unpack_bits(words, units.shape[1])
    return BitMask.from_blocks(keep, block_shape or (1, shape[1]), shape, density=density)
