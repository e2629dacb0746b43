"""Products with the kept blocks of a dense weight on a CPU, by the compiled engine or in plain torch."""

import torch
from torch import Tensor

from sdp_kernels import cpu_engine
from sdp_kernels.masks import ActiveBlocks, Walk

# Share of the blocks up to which the dense product is slower, for the compiled engine and for plain torch.
MOST_DENSE = {True: 0.5, False: 0.3}
DTYPES = (torch.float32, torch.float64)  # matrix instructions for half precision outrun every sparse product


def worthwhile(input: Tensor, lists: ActiveBlocks) -> bool:
    """Whether walking along the kept blocks is faster than the dense product."""
    if input.dtype not in DTYPES:
        return False
    return int(lists.crow_indices[-1]) <= MOST_DENSE[_compiled(input.dtype)] * lists.col_indices.numel()


def _compiled(dtype: torch.dtype) -> bool:
    """Whether the compiled engine multiplies this dtype."""
    return dtype == torch.float32 and cpu_engine.is_compiled(dtype)


def product(
    input: Tensor, weight: Tensor, bias: Tensor | None, lists: ActiveBlocks, block_shape: tuple[int, int]
) -> Tensor:
    """(tokens, in) times the kept blocks of the transposed weight, plus the bias."""
    rows, columns = _by_rows(lists)
    values = _grid(weight, block_shape)[rows, columns]
    return cpu_engine.product(input, values, bias, Walk(lists.crow_indices, columns), weight.shape[0], None)


def input_gradient(gradient: Tensor, weight: Tensor, lists: ActiveBlocks, block_shape: tuple[int, int]) -> Tensor:
    """(tokens, out) times the kept blocks of the weight."""
    columns = _lines(lists.ccol_indices)
    rows = lists.row_indices[: columns.numel()]
    values = _grid(weight, block_shape)[rows, columns].transpose(1, 2)
    return cpu_engine.product(gradient, values, None, Walk(lists.ccol_indices, rows), weight.shape[1], None)


def weight_gradient(
    gradient: Tensor, input: Tensor, weight: Tensor, lists: ActiveBlocks, block_shape: tuple[int, int]
) -> Tensor:
    """The gradient of the weight, zero in pruned blocks."""
    rows, columns = _by_rows(lists)
    result = torch.zeros_like(weight, dtype=gradient.dtype, memory_format=torch.contiguous_format)
    if _compiled(gradient.dtype):
        from sdp_kernels.cpu_engine.gradient import add_weight_gradient

        slope, x = (tensor.detach().contiguous().numpy() for tensor in (gradient, input))
        add_weight_gradient(slope, x, rows.int().numpy(), columns.numpy(), block_shape, result.numpy())
    else:
        values = cpu_engine.values_product(gradient, input, lists.crow_indices, columns, block_shape)
        _grid(result, block_shape)[rows, columns] = values
    return result.to(weight.dtype)


def _grid(weight: Tensor, block_shape: tuple[int, int]) -> Tensor:
    """(out, in) -> (block rows, block columns, rows, columns)."""
    height, width = block_shape
    grid = weight.contiguous().view(weight.shape[0] // height, height, weight.shape[1] // width, width)
    return grid.transpose(1, 2)


def _by_rows(lists: ActiveBlocks) -> tuple[Tensor, Tensor]:
    rows = _lines(lists.crow_indices)
    return rows, lists.col_indices[: rows.numel()]


def _lines(offsets: Tensor) -> Tensor:
    """The row of each block from where the rows begin."""
    return torch.repeat_interleave(offsets.diff())
