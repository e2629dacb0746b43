"""The block-sparse product in plain torch: one dense product for each row of blocks, on the input columns it needs."""

from itertools import pairwise

import torch
from torch import Tensor

from sdp_kernels.masks import Walk


def rows_product(input: Tensor, values: Tensor, walk: Walk, out_features: int) -> Tensor:
    """Each row of blocks times the input columns that its blocks stand on.

    Args:
        input: (tokens, in).
        values: (blocks, out side, in side).
        walk: where the blocks stand.
        out_features: columns of the result; fewer than the rows of blocks hold if these are padded.

    Returns:
        (tokens, out_features), zero where a row has no block.
    """
    _, height, width = values.shape
    tokens, in_features = input.shape
    grid = -(-in_features // width)
    columns = torch.nn.functional.pad(input, (0, grid * width - in_features)).reshape(tokens, grid, width)
    bounds = walk.offsets.tolist()
    output = input.new_zeros(tokens, (len(bounds) - 1) * height)
    for row, (start, end) in enumerate(pairwise(bounds)):
        if start == end:
            continue
        blocks = values[start:end] if walk.positions is None else values[walk.positions[start:end]]
        gathered = columns[:, walk.neighbours[start:end]].reshape(tokens, (end - start) * width)
        kept = blocks.transpose(1, 2).reshape(-1, height)
        torch.mm(gathered, kept, out=output[:, row * height : (row + 1) * height])
    return output[:, :out_features]


def values_product(
    gradient: Tensor, input: Tensor, offsets: Tensor, neighbours: Tensor, block_shape: tuple[int, int]
) -> Tensor:
    """The gradient of the values: for each block, its rows of the gradient times its columns of the input.

    Args:
        gradient: (tokens, out).
        input: (tokens, in).
        offsets: (rows of blocks + 1,).
        neighbours: (blocks,) the block column of each block.
        block_shape: (out, in) of a block.

    Returns:
        (blocks, *block_shape).
    """
    height, width = block_shape
    bounds = offsets.tolist()
    tokens, in_features = input.shape
    grid = -(-in_features // width)
    gradient = torch.nn.functional.pad(gradient, (0, (len(bounds) - 1) * height - gradient.shape[1]))
    columns = torch.nn.functional.pad(input, (0, grid * width - in_features)).reshape(tokens, grid, width)
    result = gradient.new_zeros(neighbours.numel(), height, width)
    for row, (start, end) in enumerate(pairwise(bounds)):
        if start == end:
            continue
        gathered = columns[:, neighbours[start:end]].reshape(tokens, (end - start) * width)
        product = gradient[:, row * height : (row + 1) * height].T @ gathered
        result[start:end] = product.view(height, end - start, width).transpose(0, 1)
    return result
