"""Products with the kept blocks of a dense weight on a CPU, by the compiled engine or in plain torch."""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from sdp_kernels import cpu_engine
from sdp_kernels.masks import ActiveBlocks, BitMask, Walk, unpack_bits

# Share of the blocks up to which the dense product is slower, for the compiled engine and for plain torch.
MOST_DENSE = {True: 0.5, False: 0.3}
DTYPES = (torch.float32, torch.float64)  # matrix instructions for half precision outrun every sparse product
SMALLEST_HEIGHT = 16  # of blocks that fill the vectors of the compiled engine


def worthwhile(dtype: torch.dtype, mask: BitMask) -> bool:
    """Whether walking along the kept blocks is faster than the dense product."""
    if dtype not in DTYPES or mask.block_shape is None:
        return False
    if _compiled(dtype):
        return mask.block_shape[0] >= SMALLEST_HEIGHT and _density(mask, mask.block_shape[0]) <= MOST_DENSE[True]
    lists = mask.lists
    return lists is not None and int(lists.crow_indices[-1]) <= MOST_DENSE[False] * lists.col_indices.numel()


def _compiled(dtype: torch.dtype) -> bool:
    """Whether the compiled engine multiplies this dtype."""
    return dtype == torch.float32 and cpu_engine.is_compiled(dtype)


def _density(mask: BitMask, height: int) -> float:
    """The share of the weights that is kept, from one row of every row of blocks."""
    kept = unpack_bits(mask.words[::height], mask.shape[1])
    return int(kept.count_nonzero()) / max(1, kept.numel())


def product(input: Tensor, weight: Tensor, bias: Tensor | None, mask: BitMask) -> Tensor:
    """(tokens, in) times the kept blocks of the transposed weight, plus the bias."""
    if _compiled(input.dtype):
        output = input.new_empty(len(input), len(weight))
        shift = input.new_zeros(len(weight)) if bias is None else bias
        _kept_columns(mask).multiply(*_arrays(input, weight, shift), output.numpy())
        return output
    rows, columns = _by_rows(mask)
    values = _grid(weight, mask)[rows, columns]
    return cpu_engine.product(input, values, bias, Walk(_lists(mask).crow_indices, columns), weight.shape[0], None)


def input_gradient(gradient: Tensor, weight: Tensor, mask: BitMask) -> Tensor:
    """(tokens, out) times the kept blocks of the weight."""
    if _compiled(gradient.dtype):
        result = gradient.new_empty(len(gradient), weight.shape[1])
        _kept_columns(mask).input_gradient(*_arrays(gradient, weight), result.numpy())
        return result
    lists = _lists(mask)
    columns = _lines(lists.ccol_indices)
    rows = lists.row_indices[: columns.numel()]
    values = _grid(weight, mask)[rows, columns].transpose(1, 2)
    return cpu_engine.product(gradient, values, None, Walk(lists.ccol_indices, rows), weight.shape[1], None)


def weight_gradient(gradient: Tensor, input: Tensor, weight: Tensor, mask: BitMask) -> Tensor:
    """The gradient of the weight, zero in pruned blocks."""
    if _compiled(gradient.dtype):
        result = gradient.new_empty(weight.shape)
        _kept_columns(mask).weight_gradient(*_arrays(gradient, input), result.numpy())
    else:
        assert mask.block_shape is not None
        rows, columns = _by_rows(mask)
        result = gradient.new_zeros(weight.shape)
        offsets = _lists(mask).crow_indices
        _grid(result, mask)[rows, columns] = cpu_engine.values_product(
            gradient, input, offsets, columns, mask.block_shape
        )
    return result.to(weight.dtype)


def _kept_columns(mask: BitMask) -> Any:
    """What the compiled engine multiplies with."""
    from sdp_kernels.cpu_engine.columns import KeptColumns

    assert mask.block_shape is not None
    words = mask.words.contiguous().numpy()
    return KeptColumns(words, mask.shape[1], mask.block_shape[0], torch.get_num_threads())


def _arrays(*tensors: Tensor) -> Iterator[Any]:
    """Contiguous arrays for the compiled engine."""
    return (tensor.detach().contiguous().numpy() for tensor in tensors)


def _grid(weight: Tensor, mask: BitMask) -> Tensor:
    """(out, in) -> (block rows, block columns, rows, columns)."""
    assert mask.block_shape is not None
    height, width = mask.block_shape
    grid = weight.contiguous().view(weight.shape[0] // height, height, weight.shape[1] // width, width)
    return grid.transpose(1, 2)


def _by_rows(mask: BitMask) -> tuple[Tensor, Tensor]:
    """Block row and block column of each kept block."""
    lists = _lists(mask)
    rows = _lines(lists.crow_indices)
    return rows, lists.col_indices[: rows.numel()]


def _lists(mask: BitMask) -> ActiveBlocks:
    assert mask.lists is not None
    return mask.lists


def _lines(offsets: Tensor) -> Tensor:
    """The row of each block from where the rows begin."""
    return torch.repeat_interleave(offsets.diff())
