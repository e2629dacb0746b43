"""Block-sparse products of integers: what is rounded and how, the same integers on every path, gradients, refusals."""

import copy
import os
import pickle
import platform
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from sdp_kernels import BlockSparseMatrix, block_sparse_linear, use_backend
from sdp_kernels.block_sparse_linear import block_sparse_linear_reference
from sdp_kernels.block_sparse_linear.matrix import MOST_INPUTS
from sdp_kernels.block_sparse_linear.reference import quantize_tokens
from sdp_kernels.cpu_engine import availability
from tests.sdp_kernels.test_block_sparse_linear import ACTIVATIONS, case

BLOCK_SHAPES = [(32, 4), (16, 4), (32, 1), (32, 32), (16, 2), (5, 3), (24, 8), (7, 6)]


@pytest.fixture(params=["engine", "gathered"])
def path(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """The compiled engine, or plain torch where it is not to be had."""
    if request.param == "engine":
        request.getfixturevalue("numba")
    else:
        monkeypatch.setattr(availability, "_numba_installed", lambda: False)
    return str(request.param)


def integer_sums(input: Tensor, matrix: BlockSparseMatrix) -> tuple[np.ndarray, np.ndarray]:
    """Sums of integers and their factors, in NumPy, by the words of the definition."""
    values = replace(matrix.dequantize(), values=matrix.values.float()).to_dense().numpy().astype(np.int64)
    sums, factors = [], []
    assert matrix.scales is not None
    for token in input.float().numpy():
        least, largest = min(token.min(), np.float32(0)), max(token.max(), np.float32(0))
        span = largest - least
        zero = int(np.rint(-least * (np.float32(255) / span)))
        integers = np.rint(token * (np.float32(255) / span)).astype(np.int64) + zero
        sums.append(values @ (integers.clip(0, 255) - zero))
        factors.append(span / np.float32(255) * matrix.scales.numpy())
    return np.array(sums), np.array(factors)


@pytest.mark.parametrize("tokens", [1, 5, 13, 40])
@pytest.mark.parametrize("block_shape", BLOCK_SHAPES)
@pytest.mark.parametrize("shape", [(64, 64), (65, 70), (48, 33)])
def test_integers_are_those_of_the_definition(
    path: str, block_shape: tuple[int, int], shape: tuple[int, int], tokens: int
) -> None:
    input, matrix, bias = case(tokens, shape, block_shape)
    quantized = matrix.quantize()
    got = block_sparse_linear(input, quantized, bias)
    assert torch.equal(got, block_sparse_linear_reference(input, quantized, bias)), "to the bit"
    sums, factors = integer_sums(input, quantized)
    expected = sums.astype(np.float32) * factors + bias.numpy()
    np.testing.assert_allclose(got.numpy(), expected, rtol=1e-5, atol=1e-5)
    packed = block_sparse_linear(input, quantized.packed(), bias)
    assert torch.equal(packed, got)


@pytest.mark.parametrize("block_shape", [(16, 4), (32, 4), (32, 1), (48, 6), (16, 1040)])
def test_rows_of_more_blocks_than_are_multiplied_together(path: str, block_shape: tuple[int, int]) -> None:
    """The engine keeps the sums of integers from one part of a row of blocks to the next."""
    input, matrix, bias = case(20, (100, 2090), block_shape)
    quantized = matrix.quantize()
    got = block_sparse_linear(input, quantized, bias)
    assert torch.equal(got, block_sparse_linear_reference(input, quantized, bias))


def test_sums_are_exact(path: str) -> None:
    """Scales of 1 leave the sums of integers themselves, at the ends of what they can be."""
    tokens, inputs = 6, 515
    input = torch.randint(0, 256, (tokens, inputs)).float() - 100
    input[:, 0], input[:, 1] = -100, 155  # so that the scale is 1 and the zero 100
    input[0] = torch.where(torch.arange(inputs) % 2 == 0, 155.0, -100.0)
    values = torch.randint(-127, 128, (40, inputs)).float()
    values[:, 0], values[0, :] = 127, 127
    quantized = BlockSparseMatrix.from_dense(values, (8, 4)).quantize()
    assert torch.equal(quantized.scales, torch.ones(40))  # type: ignore[arg-type]
    got = block_sparse_linear(input, quantized)
    assert torch.equal(got, (input.long() @ values.long().T).float())


@pytest.mark.usefixtures("numba")
def test_many_tokens_and_rows_without_blocks() -> None:
    input, matrix, bias = case(4096, (96, 68), (32, 4))
    dense = matrix.to_dense()
    dense[32:64] = 0
    quantized = BlockSparseMatrix.from_dense(dense, (32, 4)).quantize()
    got = block_sparse_linear(input, quantized, bias)
    assert torch.equal(got, block_sparse_linear_reference(input, quantized, bias))
    assert torch.equal(got[:, 32:64], bias[32:64].expand(4096, 32))


@pytest.mark.parametrize("kept", [0.0, 1.0])
@pytest.mark.parametrize("lead", [(), (0,), (2, 3)])
def test_nothing_everything_and_leading_dimensions(path: str, kept: float, lead: tuple[int, ...]) -> None:
    _, matrix, bias = case(1, (40, 36), (16, 4), density=kept)
    input = torch.randn(*lead, 36)
    quantized = matrix.quantize()
    got = block_sparse_linear(input, quantized, bias, activation="relu")
    assert got.shape == (*lead, 40)
    assert got.is_contiguous()
    assert torch.equal(got, block_sparse_linear_reference(input, quantized, bias, activation="relu"))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_activations_and_dtypes(path: str, activation: Any, dtype: torch.dtype) -> None:
    input, matrix, bias = case(9, (50, 44), (16, 4))
    input, bias = input.to(dtype), bias.to(dtype)
    got = block_sparse_linear(input, matrix.quantize(), bias, activation=activation)
    assert got.dtype == dtype
    plain = block_sparse_linear_reference(input.float(), matrix.quantize(), bias.float())
    torch.testing.assert_close(got, ACTIVATIONS[activation](plain).to(dtype))


def test_strided_inputs(path: str) -> None:
    input, matrix, bias = case(30, (48, 40), (16, 4))
    quantized = matrix.quantize()
    expected = block_sparse_linear(input[::3], quantized, bias)
    assert torch.equal(block_sparse_linear(input.T.contiguous().T[::3], quantized, bias), expected)


def test_tokens_that_are_not_finite_become_nan_and_no_others(path: str) -> None:
    input, matrix, bias = case(20, (48, 41), (16, 4))
    expected = block_sparse_linear(input, matrix.quantize(), bias)
    wrong = {2: torch.nan, 7: torch.inf, 15: -torch.inf}
    for token, value in wrong.items():
        input[token, 40 if token == 7 else 3] = value
    input[4] = 0
    got = block_sparse_linear(input, matrix.quantize(), bias)
    right = torch.tensor([token not in (*wrong, 4) for token in range(20)])
    assert got[list(wrong)].isnan().all()
    assert torch.equal(got[right], expected[right])
    assert torch.equal(got[4], bias)


def test_error_is_half_a_step_of_each() -> None:
    input, matrix, _ = case(50, (64, 80), (32, 4))
    quantized = matrix.quantize()
    assert quantized.scales is not None
    difference = (quantized.to_dense() - matrix.to_dense()).abs()
    assert (difference <= quantized.scales[:, None] * 0.5001).all()
    assert quantized.values.abs().amax() <= 127
    assert (quantized.to_dense().abs().amax(1) > 0).all()
    integers, zeros, scales = quantize_tokens(input)
    assert (((integers - zeros) * scales - input).abs() <= scales * 0.5001).all()
    assert int(integers.min()) >= 0
    assert int(integers.max()) <= 255
    assert torch.equal(quantized.dequantize().quantize().values, quantized.values), "again gives the same"


def test_gradients_pass_straight_through(path: str) -> None:
    input, matrix, bias = case(7, (40, 36), (16, 4))
    quantized = matrix.quantize()
    leaves = [input.requires_grad_(), bias.requires_grad_()]
    others = [leaf.detach().clone().requires_grad_() for leaf in leaves]
    cotangent = torch.randn(7, 40)
    got = block_sparse_linear(leaves[0], quantized, leaves[1], activation="gelu")
    with use_backend("reference"):
        expected = block_sparse_linear(others[0], quantized, others[1], activation="gelu")
    torch.testing.assert_close(got, expected)
    got.backward(cotangent)
    expected.backward(cotangent)
    for leaf, other in zip(leaves, others, strict=True):
        torch.testing.assert_close(leaf.grad, other.grad)
    linear = others[0].detach().requires_grad_()
    straight = torch.autograd.grad(block_sparse_linear(linear, quantized).sum(), linear)[0]
    torch.testing.assert_close(straight, quantized.to_dense().sum(0).expand(7, 36))


def test_operator_is_registered_rightly() -> None:
    input, matrix, bias = case(7, (40, 36), (16, 4))
    weight = matrix.quantize()
    arguments = (weight.values, weight.scales, bias.requires_grad_(), weight.crow_indices, weight.col_indices, None)
    torch.library.opcheck(torch.ops.sdp_kernels.block_sparse_linear_int8, (input.requires_grad_(), *arguments))


@pytest.mark.usefixtures("numba")
def test_compiles_copies_pickles_and_serves_threads() -> None:
    input, matrix, bias = case(33, (64, 64), (32, 4))
    weight = matrix.quantize()
    expected = block_sparse_linear(input, weight, bias)
    compiled = torch.compile(lambda rows: block_sparse_linear(rows, weight, bias), backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(input), expected)
    for other in (copy.deepcopy(weight), pickle.loads(pickle.dumps(weight)), weight.to("cpu")):
        assert other.equal(weight)
        assert torch.equal(block_sparse_linear(input, other, bias), expected)
    with ThreadPoolExecutor(4) as pool:
        for output in pool.map(lambda _: block_sparse_linear(input, weight, bias), range(20)):
            assert torch.equal(output, expected)


@pytest.mark.parametrize("block_shape", [(32, 4), (32, 32), (16, 3)])
def test_values_that_change_are_never_stale(path: str, block_shape: tuple[int, int]) -> None:
    input, matrix, bias = case(20, (64, 48), block_shape)
    for weight in (matrix.packed(), matrix.quantize().packed()):
        block_sparse_linear(input, weight, bias)
        for change in (lambda values: values.data.copy_(values.flip(0)), lambda values: values.zero_()):
            change(weight.values)
            expected = block_sparse_linear_reference(input, weight, bias)
            torch.testing.assert_close(block_sparse_linear(input, weight, bias, path="sparse"), expected)


def test_packing_changes_the_layout_only() -> None:
    _, matrix, _ = case(1, (64, 50), (32, 8))
    packed = matrix.packed()
    assert packed.block_shape == (32, 8)
    assert torch.equal(packed.values, matrix.values)
    assert packed.values.transpose(1, 2).is_contiguous()
    assert packed.packed().values.data_ptr() == packed.values.data_ptr()
    for other, width in ((matrix.quantize(), 4), (matrix.to(torch.bfloat16), 2)):
        packed = other.packed()
        assert packed.block_shape == (32, width)
        assert packed.values.is_contiguous()
        assert torch.equal(packed.to_dense(), other.to_dense())
        assert packed.packed() is packed
    assert matrix.quantize().packed().split(2).equal(matrix.quantize().split(2))


OTHER_REGISTERS = """
import sys, torch, numba
from sdp_kernels import BlockSparseMatrix, block_sparse_linear
from sdp_kernels.block_sparse_linear import block_sparse_linear_reference
from sdp_kernels.cpu_engine import register_tile
for block_shape in ((16, 4), (32, 1)):
    weight = BlockSparseMatrix.from_dense(torch.randn(50, 70), block_shape).quantize()
    for tokens in (1, 7, 30):
        input = torch.randn(tokens, 70)
        got = block_sparse_linear(input, weight)
        assert torch.equal(got, block_sparse_linear_reference(input, weight)), (block_shape, tokens)
assert register_tile.LANES == int(sys.argv[1]) and not register_tile.HAS_VNNI
"""


@pytest.mark.usefixtures("numba")
@pytest.mark.skipif(platform.machine() not in ("x86_64", "AMD64"), reason="not x86")
@pytest.mark.parametrize(("lanes", "name", "features"), [(8, "haswell", "+avx,+avx2,+fma"), (4, "nehalem", "+sse4.2")])
def test_integers_of_narrower_registers(lanes: int, name: str, features: str, tmp_path: Path) -> None:
    """By instructions that every CPU of its kind has, instead of those that multiply bytes."""
    settings = {"NUMBA_CPU_NAME": name, "NUMBA_CPU_FEATURES": features, "NUMBA_CACHE_DIR": str(tmp_path)}
    done = subprocess.run(
        [sys.executable, "-c", OTHER_REGISTERS, str(lanes)],
        capture_output=True,
        text=True,
        check=False,
        env=os.environ | settings,
    )
    assert done.returncode == 0, done.stderr


COMPILED_AHEAD = """
from numba import njit, types
from sdp_kernels.cpu_engine import register_tile
product = register_tile.multiply_tiles

@njit
def call(vectors, tiles, packed, height, columns, width, sums, first, last, rows, terms, result, function):
    product(vectors, tiles, packed, height, columns, width, sums, first, last, rows, terms, result, function)

matrix, tiles = (types.Array(types.float32, dimensions, "C") for dimensions in (2, 3))
lists, index, flag = types.Array(types.int32, 1, "C"), types.intp, types.boolean
for words in (types.float32, types.uint32, types.int32):
    packed = types.Array(words, 1, "C")
    call.compile((index, tiles, packed, index, lists, index, tiles, flag, flag, matrix, matrix, matrix, index))
code = "".join(call.inspect_asm().values())
for instruction in ("vpdpbusd\\t%zmm", "vdpbf16ps\\t%zmm", "vfmadd231ps\\t%zmm"):
    assert code.count(instruction) >= 24, instruction
assert "%rsp), %zmm" not in code, "an accumulator left its register"
"""


@pytest.mark.usefixtures("numba")
@pytest.mark.skipif(platform.machine() not in ("x86_64", "AMD64"), reason="not x86")
def test_the_widest_instructions_compile_without_a_cpu_that_has_them(tmp_path: Path) -> None:
    wide = "+avx,+avx2,+fma,+avx512f,+avx512bw,+avx512dq,+avx512vl,+avx512vnni,+avx512bf16"
    settings = {"NUMBA_CPU_NAME": "znver4", "NUMBA_CPU_FEATURES": wide, "NUMBA_CACHE_DIR": str(tmp_path)}
    done = subprocess.run(
        [sys.executable, "-c", COMPILED_AHEAD], capture_output=True, text=True, check=False, env=os.environ | settings
    )
    assert done.returncode == 0, done.stderr


INT8 = BlockSparseMatrix.from_dense(torch.ones(32, 8), (16, 4)).quantize()


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: INT8.quantize(), "values must be floating-point to be quantized, got torch.int8"),
        (
            lambda: replace(INT8.dequantize(), values=torch.full((4, 16, 4), torch.inf)).quantize(),
            "values must be finite to be quantized, got 256 that are not, the first in row 0",
        ),
        (
            lambda: BlockSparseMatrix.from_dense(torch.ones(1, MOST_INPUTS + 1), (1, 4)).quantize(),
            f"shape must have at most {MOST_INPUTS} columns",
        ),
        (lambda: INT8.to(torch.float32), "dtype must be torch.int8 of a quantized matrix, got torch.float32"),
        (lambda: INT8.to_torch_bsr(), "values must be floating-point for torch.sparse_bsr"),
        (lambda: INT8.split(3), "width must divide that of the blocks, 4, got 3"),
        (lambda: with_scales(torch.ones(31)), r"scales must have shape \(32,\), got \(31,\)"),
        (lambda: with_scales(torch.ones(32).double()), "scales must be a float32 tensor, got torch.float64"),
        (lambda: with_scales(-torch.ones(32)), "scales must be finite and above 0, got -1.0 for row 0"),
        (lambda: with_scales(torch.zeros(32)), "scales must be finite and above 0, got 0.0 for row 0"),
        (lambda: with_scales(torch.full((32,), torch.nan)), "scales must be finite and above 0, got nan for row 0"),
        (lambda: with_scales(None), "values must be a floating-point tensor, got torch.int8; int8 needs scales"),
        (
            lambda: replace(INT8, values=INT8.values.float(), lists=None),
            "values must be int8 where there are scales, got torch.float32",
        ),
    ],
)
def test_what_is_refused(make: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()


def with_scales(scales: Tensor | None) -> BlockSparseMatrix:
    return replace(INT8, scales=scales, lists=None)  # type: ignore[arg-type]  # so that all is checked


def test_the_kernels_say_why_they_do_not_take_it() -> None:
    with use_backend("triton"), pytest.raises(NotImplementedError, match="the values are int8"):
        block_sparse_linear(torch.ones(1, 8), INT8)


def test_dense_result_is_near_that_of_float32() -> None:
    input, matrix, bias = case(64, (96, 128), (32, 4), density=0.5)
    expected = F.linear(input, matrix.to_dense(), bias)
    got = block_sparse_linear(input, matrix.quantize(), bias)
    assert (got - expected).norm() < 0.02 * expected.norm()
