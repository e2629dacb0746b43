"""Scaled dot-product attention on the compiled engine, for inference: no matrix of scores is ever written to memory.

Both products run in the tiles of register_tile.py, the lanes being queries: keys, and then features of the values, are
the tokens of a tile. The softmax then runs along the keys, lane by lane, on scores that stay in the cache.
"""

# mypy: disable-error-code="no-untyped-def,no-untyped-call,untyped-decorator,attr-defined,call-arg"
# mypy: disable-error-code="import-untyped,import-not-found,unreachable"

import math

import numpy as np
import torch
from numba import prange
from torch import Tensor
from torch.nn import functional as F

from sdp_kernels.cpu_engine.column_tile import transpose
from sdp_kernels.cpu_engine.engine import fill_tile
from sdp_kernels.cpu_engine.function_tile import COLUMNS, divide, soften
from sdp_kernels.cpu_engine.register_tile import multiply_rest, multiply_tiles
from sdp_kernels.cpu_engine.threads import compiled, run_on_threads
from sdp_kernels.cpu_engine.vectors import TILE, TILE_ROWS


def attention(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scale: float) -> Tensor:
    """softmax(query @ key^T * scale + mask) @ value, as `torch.nn.functional.scaled_dot_product_attention` has it.

    Computed in float32, whatever the dtype; nothing is kept for a backward. A query that may see no key gets zeros.

    Args:
        query: (batch, heads, queries, depth) on the CPU.
        key: (batch, heads, keys, depth), at least one key.
        value: (batch, heads, keys, width).
        mask: which keys a query sees, or, floating-point, what is added to its scores; of a shape that broadcasts to
            (batch, heads, queries, keys); None: all.
        scale: of the scores.

    Returns:
        (batch, heads, queries, width) of the dtype of the query, a view of (batch, queries, heads, width).
    """
    batch, heads, queries, _ = query.shape
    output = torch.empty(batch, queries, heads, value.shape[3])
    inputs = (_with_rows(tensor.detach().float()).numpy() for tensor in (query, key, value))
    added = _columns_of(mask, query, key).numpy()
    threads = torch.get_num_threads()
    run_on_threads(threads, _attend, *inputs, added, np.float32(scale * math.log2(math.e)), output.numpy(), threads)
    return output.to(query.dtype).transpose(1, 2)


def _with_rows(tensor: Tensor) -> Tensor:
    return tensor if tensor.stride(3) == 1 else tensor.contiguous()


def _columns_of(mask: Tensor | None, query: Tensor, key: Tensor) -> Tensor:
    """What is added to scores in powers of two, (batch or 1, heads or 1, keys, queries, filled up, or 1); or empty."""
    if mask is None:
        return torch.empty(0, 0, 0, 0)
    mask = mask.detach().reshape(*(1,) * (4 - mask.dim()), *mask.shape)
    if mask.shape[2] > 1 and mask.stride(2) == 0:
        mask = mask[:, :, :1]
    mask = mask.expand(*mask.shape[:3], key.shape[2])
    if mask.dtype == torch.bool:
        added = torch.zeros(mask.shape).masked_fill(~mask, -torch.inf)
    else:
        added = mask.float() * math.log2(math.e)
    added = added.transpose(2, 3)
    fill = -query.shape[2] % COLUMNS if added.shape[3] > 1 else 0
    return F.pad(added, (0, fill)) if fill else added.contiguous()


@compiled(parallel=True)
def _attend(query, key, value, added, scale, output, parts):
    for part in prange(parts):
        _attend_part(part, parts, query, key, value, added, scale, output)


@compiled()
def _attend_part(part, parts, query, key, value, added, scale, output):
    batch, heads, queries, depth = query.shape
    keys, width = value.shape[2:]
    key_tiles = np.empty((-(-keys // TILE), depth, TILE_ROWS), np.float32)
    value_tiles = np.empty((-(-width // TILE), keys, TILE_ROWS), np.float32)
    weights = np.zeros((depth, COLUMNS), np.float32)
    scores = np.empty((len(key_tiles) * TILE, COLUMNS), np.float32)
    results = np.empty((len(value_tiles) * TILE, COLUMNS), np.float32)
    sums = np.empty(COLUMNS, np.float32)
    items = batch * heads
    for item in range(items * part // parts, items * (part + 1) // parts):
        one, head = item // heads, item % heads
        for i in range(len(key_tiles)):
            start = i * TILE
            fill_tile(key[one, head, start:], min(TILE, keys - start), key_tiles[i])
        for i in range(len(value_tiles)):
            start = i * TILE
            for k in range(keys):
                for j in range(min(TILE, width - start)):
                    value_tiles[i, k, j] = value[one, head, k, start + j]
        for start in range(0, queries, COLUMNS):
            count = min(COLUMNS, queries - start)
            transpose(query[one, head, start : start + count], weights)
            _multiply(key_tiles, keys, weights, scores)
            if added.size:
                here = added[one % added.shape[0], head % added.shape[1]]
                _scale_and_add(scores[:keys], scale, here if here.shape[1] == 1 else here[:, start : start + COLUMNS])
            soften(scores[:keys], np.float32(1) if added.size else scale, sums)
            _multiply(value_tiles, width, scores[:keys], results)
            divide(results[:width], sums)
            transpose(results[:width, :count], output[one, start : start + count, head])


@compiled()
def _multiply(tiles, count, weights, sums):
    """sums[t] = the sum over k of tiles[.., k, t] * weights[k], for `count` tokens."""
    first, nothing = np.zeros(1, np.int32), np.zeros((1, 1), np.float32)
    flat, steps, whole = weights.reshape(-1), len(weights), count // TILE
    totals = sums.reshape(len(tiles), TILE, COLUMNS)
    at_ends = True, False, nothing
    multiply_tiles(2, tiles[:whole], flat, COLUMNS, first, steps, totals[:whole], *at_ends, nothing, nothing, 0)
    if count % TILE:
        rest = tiles[whole:], count % TILE, flat, COLUMNS, first, steps, totals[whole:]
        multiply_rest(2, *rest, *at_ends, nothing, nothing, 0)


@compiled()
def _scale_and_add(scores, scale, added):
    """scores = scores * scale + added, whose columns are those of the scores or one for all."""
    for k in range(len(scores)):
        if added.shape[1] == 1:
            for lane in range(COLUMNS):
                scores[k, lane] = scores[k, lane] * scale + added[k, 0]
        else:
            for lane in range(COLUMNS):
                scores[k, lane] = scores[k, lane] * scale + added[k, lane]
