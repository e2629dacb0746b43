"""The products of a masked weight whose kept weights are whole columns of blocks, as high as these.

However wide the blocks of a mask are, what it keeps are such columns. They are listed from the words of the mask in
every call, and packed next to each other from the dense weight: that costs little beside the products, and is never out
of date.
"""

# mypy: disable-error-code="no-untyped-def,no-untyped-call,untyped-decorator,attr-defined"
# mypy: disable-error-code="import-untyped,import-not-found"

import numba
import numpy as np
from numba import prange

from sdp_kernels.cpu_engine.engine import NOTHING, multiply
from sdp_kernels.cpu_engine.gradient import add_weight_gradient, row_of, write_input_gradient
from sdp_kernels.cpu_engine.packing import Packed
from sdp_kernels.cpu_engine.threads import compiled, run_on_threads
from sdp_kernels.cpu_engine.vectors import LANES


@compiled()
def _list_columns(words, columns, height):
    """Where each row of blocks begins in the list of its kept columns, and that list."""
    rows = len(words) // height
    offsets = np.zeros(rows + 1, np.int32)
    found = np.empty(rows * columns, np.int32)
    count = 0
    for row in range(rows):
        for column in range(columns):
            found[count] = column  # which the next one replaces if it is not kept
            count += (words[row * height, column >> 5] >> (column & 31)) & 1
        offsets[row + 1] = count
    return offsets, found[:count].copy()


@compiled(parallel=True)
def _pack(weight, offsets, columns, height, packed, parts):
    """packed[n, h] = weight[row * height + h, columns[n]]; zeros up to the padded height."""
    count, padded_height = packed.shape
    for part in prange(parts):
        row = row_of(offsets, count * part // parts)
        for n in range(count * part // parts, count * (part + 1) // parts):
            while offsets[row + 1] <= n:
                row += 1
            for h in range(height):
                packed[n, h] = weight[row * height + h, columns[n]]
            for h in range(height, padded_height):
                packed[n, h] = 0


@compiled(parallel=True)
def _unpack(packed, offsets, columns, height, weight, parts):
    """The inverse of `_pack`, with zeros in what is not kept."""
    rows = len(offsets) - 1
    for part in prange(parts):
        for row in range(rows * part // parts, rows * (part + 1) // parts):
            for h in range(height):
                line = weight[row * height + h]
                line[:] = 0
                for n in range(offsets[row], offsets[row + 1]):
                    line[columns[n]] = packed[n, h]


class KeptColumns:
    """The kept columns of the blocks of a mask. All arrays are contiguous, and float32 but for the words.

    Args:
        words: (out, ceil(in / 32)) int32, of a `BitMask`.
        in_features: columns of the weight.
        height: rows of a block.
        threads: how many to run on; fewer if numba was started with fewer.
    """

    def __init__(self, words, in_features: int, height: int, threads: int) -> None:
        self.threads = min(threads, numba.config.NUMBA_NUM_THREADS)
        self.height, self.padded_height = height, -(-height // LANES) * LANES
        self.offsets, self.columns = _list_columns(words, in_features, height)

    def multiply(self, input, weight, bias, output) -> None:
        """Write input @ masked weight.T + bias: (tokens, in), (out, in), (out,) and (tokens, out)."""
        values = self._packed(weight)[:, None]
        packed = Packed(values, self.offsets, self.columns, self.height, weight.shape[1], gathers=False)
        multiply(packed, input, bias, NOTHING, output, self.threads)

    def input_gradient(self, gradient, weight, result) -> None:
        """Write gradient @ masked weight: (tokens, out), (out, in) and (tokens, in)."""
        self._run(write_input_gradient, gradient, self._packed(weight), result)

    def weight_gradient(self, gradient, input, result) -> None:
        """Write gradient.T @ input where kept, and zeros elsewhere: (tokens, out), (tokens, in) and (out, in)."""
        packed = np.zeros((len(self.columns) + 1, self.padded_height), np.float32)  # with a row to spare
        self._run(add_weight_gradient, gradient, input, packed)
        self._run(_unpack, packed, result)

    def _packed(self, weight):
        packed = np.empty((len(self.columns), self.padded_height), np.float32)
        self._run(_pack, weight, packed)
        return packed

    def _run(self, function, *arrays) -> None:
        """Call a function of arrays, of which it writes the last."""
        *inputs, result = arrays
        lists = self.offsets, self.columns, self.height
        run_on_threads(self.threads, function, *inputs, *lists, result, self.threads)
