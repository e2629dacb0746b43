"""The block-sparse product on a CPU: by the compiled engine if numba is installed, otherwise in plain torch."""

# mypy: disable-error-code="import-untyped,import-not-found"

import functools
import importlib
import importlib.util
import warnings
from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from sdp_kernels.block_sparse_linear.gathered import rows_product
from sdp_kernels.dispatch import KERNEL_DTYPES

CHUNK_ELEMENTS = 2**19  # of the output, converted or activated at a time: it stays in the cache

ACTIVATE_: Mapping[str, Callable[[Tensor], Tensor]] = {
    "relu": torch.relu_,
    "gelu": torch.ops.aten.gelu_,
    "gelu_tanh": functools.partial(torch.ops.aten.gelu_, approximate="tanh"),
    "silu": torch.ops.aten.silu_,
}


def product(
    input: Tensor,
    values: Tensor,
    bias: Tensor | None,
    offsets: Tensor,
    neighbours: Tensor,
    positions: Tensor | None,
    out_features: int,
    activation: str | None,
) -> Tensor:
    """The input times the transposed matrix of blocks, plus the bias, activated.

    Args:
        input: (tokens, in).
        values: (blocks, out side, in side); a transposed view for the transposed matrix.
        bias: (out_features,) or None.
        offsets: (rows of blocks + 1,) where each begins in the lists below.
        neighbours: (blocks,) the block column of each block.
        positions: (blocks,) its place in `values`, or None where that is the order already.
        out_features: columns of the result; fewer than the rows of blocks hold if these are padded.
        activation: key of `ACTIVATE_`, or None.

    Returns:
        (tokens, out_features), of the dtype of the input.
    """
    if is_compiled(input.dtype):
        return _compiled_product(input, values, bias, offsets, neighbours, positions, out_features, activation)
    output = rows_product(input, values, offsets, neighbours, positions, out_features).contiguous()
    if bias is not None:
        output += bias
    return output if activation is None else ACTIVATE_[activation](output)


def is_compiled(dtype: torch.dtype) -> bool:
    """Whether the compiled engine takes products of this dtype."""
    return dtype in KERNEL_DTYPES and _numba_installed()


@functools.cache
def multiplies_bfloat16() -> bool:
    """Whether this CPU has instructions for bfloat16 products; numba must be installed."""
    import llvmlite.binding

    features = llvmlite.binding.get_host_cpu_features()
    return any(features.get(name, False) for name in ("avx512bf16", "amx-bf16", "bf16"))


def _numba_installed() -> bool:
    """Whether numba is there and may run threads: OpenMP ends a forked process whose parent ran them."""
    return _finds_numba() and not _forked


def _finds_numba() -> bool:
    """Whether numba can be imported; where it is installed and cannot, that is said once."""
    reason, told = _against_numba()
    if reason and not told:
        told.append(True)
        warnings.warn(f"block-sparse products on a CPU are plain torch: {reason}", RuntimeWarning, stacklevel=2)
    return reason is None


@functools.cache
def _against_numba() -> tuple[str | None, list[bool]]:
    """Why there is no numba, empty if it is just not installed, and whether that was told.

    By importing it: each numba refuses the versions of NumPy that are newer than itself, and only then.
    """
    if importlib.util.find_spec("numba") is None:
        return "", []
    try:
        importlib.import_module("numba")
    except ImportError as error:
        return str(error), []
    return None, []


_forked = False


def leave_threads_to_parent() -> None:
    """Called in a process that was forked when the engine was loaded: products are plain torch from here on."""
    global _forked
    _forked = True


def _compiled_product(
    input: Tensor,
    values: Tensor,
    bias: Tensor | None,
    offsets: Tensor,
    neighbours: Tensor,
    positions: Tensor | None,
    out_features: int,
    activation: str | None,
) -> Tensor:
    from sdp_kernels.block_sparse_linear.engine import Engine

    transposed = not values.is_contiguous() and values.transpose(1, 2).is_contiguous()
    stored = values.transpose(1, 2) if transposed else values
    engine = Engine(
        stored.detach().float().contiguous().numpy(),
        offsets.numpy(),
        neighbours.numpy(),
        None if positions is None else positions.numpy(),
        transposed,
        torch.get_num_threads(),
    )
    bias = input.new_zeros(out_features) if bias is None else bias
    shift = bias.detach().float().contiguous().numpy()

    output = input.new_empty(input.shape[0], out_features)
    as_it_is = input.dtype == torch.float32 and activation is None
    tokens = max(1, input.shape[0]) if as_it_is else max(1, CHUNK_ELEMENTS // out_features)
    for rows, result in zip(torch.split(input.detach(), tokens), torch.split(output, tokens), strict=True):
        wide = result if result.dtype == torch.float32 else torch.empty_like(result, dtype=torch.float32)
        engine.multiply(rows.float().contiguous().numpy(), shift, wide.numpy())
        if activation is not None:
            ACTIVATE_[activation](wide)
        if wide is not result:
            result.copy_(wide)
    return output
