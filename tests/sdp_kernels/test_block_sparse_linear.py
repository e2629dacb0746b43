"""What is special to the block-sparse linear map: blocks of every shape, engines, gradients, what it refuses."""

import os
import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.fx.experimental.proxy_tensor import make_fx
from torch.nn import functional as F

from sdp_kernels import BlockSparseMatrix, block_sparse_linear, masked_linear, use_backend
from sdp_kernels.block_sparse_linear import block_sparse_linear_reference
from sdp_kernels.block_sparse_linear.launch import choose_splits
from sdp_kernels.cpu_engine import availability
from sdp_kernels.tiles import launch
from tests.sdp_kernels.rehearsal import aside

BLOCK_SHAPES = [(16, 16), (32, 32), (64, 64), (128, 128), (128, 32), (64, 32), (16, 64), (8, 24)]
ACTIVATIONS: dict[str | None, Callable[[Tensor], Tensor]] = {
    None: lambda output: output,
    "relu": F.relu,
    "gelu": F.gelu,
    "gelu_tanh": lambda output: F.gelu(output, approximate="tanh"),
    "silu": F.silu,
}
sparse_linear = partial(block_sparse_linear, path="sparse")  # never the dense product, which would prove nothing

ENGINES = ["engine", "gathered", "triton", "reference"]


@pytest.fixture(params=ENGINES)
def engine(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Each way to compute the product; the name of the backend that takes it."""
    if request.param == "triton":
        return str(request.getfixturevalue("triton_backend"))
    if request.param == "engine":
        request.getfixturevalue("numba")
    if request.param == "gathered":
        monkeypatch.setattr(availability, "_numba_installed", lambda: False)
    return "reference" if request.param == "reference" else "cpu"


@pytest.fixture
def place(engine: str, device: torch.device) -> torch.device:
    """Where tensors must lie for `engine`."""
    return device if engine == "triton" else torch.device("cpu")


def case(
    tokens: int,
    shape: tuple[int, int],
    block_shape: tuple[int, int],
    density: float = 0.4,
    device: torch.device | str = "cpu",
) -> tuple[Tensor, BlockSparseMatrix, Tensor]:
    rows, columns = (-(-size // side) for size, side in zip(shape, block_shape, strict=True))
    kept = torch.rand(rows, columns) < density
    mask = kept.repeat_interleave(block_shape[0], 0).repeat_interleave(block_shape[1], 1)[: shape[0], : shape[1]]
    matrix = BlockSparseMatrix.from_dense(torch.randn(shape), block_shape, mask)
    return torch.randn(tokens, shape[1]).to(device), matrix.to(device), torch.randn(shape[0]).to(device)


def assert_near(got: Tensor, expected: Tensor) -> None:
    """Within rounding of float32, by the size of the largest result."""
    assert got.shape == expected.shape
    scale = max([1.0, *expected.detach().abs().flatten().tolist()])
    torch.testing.assert_close(got.double(), expected.double(), rtol=0, atol=1e-5 * scale)


def assert_is_dense(input: Tensor, matrix: BlockSparseMatrix, bias: Tensor | None, backend: str) -> None:
    """Result and gradients equal those of F.linear with the dense weight."""
    bias_leaf = None if bias is None else bias.clone().requires_grad_()
    leaves = [input.clone().requires_grad_(), matrix.values.clone().requires_grad_()]
    dense = [leaf.detach().double().requires_grad_() for leaf in leaves]
    with use_backend(backend):
        got = sparse_linear(leaves[0], replace(matrix, values=leaves[1]), bias_leaf)
    double_bias = None if bias is None else bias.double().requires_grad_()
    expected = F.linear(dense[0], replace(matrix, values=dense[1]).to_dense(), double_bias)
    assert_near(got, expected)
    assert got.is_contiguous()
    cotangent = torch.randn_like(got)
    got.backward(cotangent)
    expected.backward(cotangent.double())
    for leaf, other in zip([*leaves, bias_leaf], [*dense, double_bias], strict=True):
        if leaf is not None:
            assert leaf.grad is not None
            assert_near(leaf.grad, other.grad)


def skip_if_refused(engine: str, block_shape: tuple[int, int]) -> None:
    if engine == "triton" and not set(block_shape) <= {16, 32, 64, 128}:
        pytest.skip("not for the kernels")


@pytest.mark.parametrize("block_shape", BLOCK_SHAPES)
@pytest.mark.usefixtures("nan_filled_memory")
def test_equals_dense_for_blocks_that_fit(engine: str, place: torch.device, block_shape: tuple[int, int]) -> None:
    skip_if_refused(engine, block_shape)
    height, width = block_shape
    assert_is_dense(*case(21, (2 * height, 3 * width), block_shape, device=place), engine)


@pytest.mark.parametrize("block_shape", BLOCK_SHAPES)
@pytest.mark.usefixtures("nan_filled_memory")
def test_equals_dense_for_blocks_that_do_not_fit(
    engine: str, place: torch.device, block_shape: tuple[int, int]
) -> None:
    skip_if_refused(engine, block_shape)
    height, width = block_shape
    assert_is_dense(*case(5, (2 * height + 7, 2 * width - 5), block_shape, 0.7, place), engine)


@pytest.mark.parametrize("tokens", [0, 1, 2, 4, 9, 12, 13, 24, 67])
@pytest.mark.usefixtures("nan_filled_memory")
def test_any_number_of_tokens(engine: str, place: torch.device, tokens: int) -> None:
    assert_is_dense(*case(tokens, (96, 80), (32, 16), device=place), engine)


@pytest.mark.parametrize(
    "kept",
    [
        torch.zeros(3, 4, dtype=torch.bool),
        torch.ones(3, 4, dtype=torch.bool),
        torch.arange(12).view(3, 4) == 6,
        (torch.arange(3) == 1)[:, None].repeat(1, 4),
        (torch.arange(4) == 2)[None, :].repeat(3, 1),
    ],
    ids=["none", "all", "one", "one row", "one column"],
)
@pytest.mark.usefixtures("nan_filled_memory")
def test_empty_and_full_rows_and_columns(engine: str, place: torch.device, kept: Tensor) -> None:
    mask = kept.repeat_interleave(16, 0).repeat_interleave(32, 1)
    matrix = BlockSparseMatrix.from_dense(torch.randn(48, 128), (16, 32), mask).to(place)
    for bias in (torch.randn(48, device=place), None):
        assert_is_dense(torch.randn(7, 128, device=place), matrix, bias, engine)


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("with_bias", [True, False])
def test_activations(engine: str, place: torch.device, activation: Any, with_bias: bool) -> None:
    input, matrix, bias = case(13, (64, 48), (32, 16), device=place)
    bias_used = bias if with_bias else None
    expected = ACTIVATIONS[activation](F.linear(input, matrix.to_dense(), bias_used))
    with use_backend(engine):
        assert_near(sparse_linear(input, matrix, bias_used, activation=activation), expected)
        leaf = input.clone().requires_grad_()
        trained = sparse_linear(leaf, matrix, bias_used, activation=activation)
    assert_near(trained.detach(), expected)
    other = input.clone().requires_grad_()
    ACTIVATIONS[activation](F.linear(other, matrix.to_dense(), bias_used)).sum().backward()
    trained.sum().backward()
    assert leaf.grad is not None
    assert other.grad is not None
    assert_near(leaf.grad, other.grad)


@pytest.mark.parametrize("lead", [(), (3,), (2, 3), (2, 0, 3)])
def test_leading_dimensions_are_restored(engine: str, place: torch.device, lead: tuple[int, ...]) -> None:
    _, matrix, bias = case(1, (32, 48), (16, 16), device=place)
    input = torch.randn(*lead, 48, device=place)
    with use_backend(engine):
        output = sparse_linear(input, matrix, bias)
    assert output.shape == (*lead, 32)
    assert_near(output, F.linear(input, matrix.to_dense(), bias))


def test_strided_inputs(engine: str, place: torch.device) -> None:
    input, matrix, bias = case(20, (64, 64), (32, 32), device=place)
    expected = F.linear(input, matrix.to_dense(), bias)
    strided = [input.T.contiguous().T, torch.cat((input, input), 1)[:, :64], input.repeat_interleave(2, 0)[::2]]
    values = replace(matrix, values=matrix.values.transpose(1, 2).contiguous().transpose(1, 2))
    with use_backend(engine):
        for other in strided:
            assert_near(sparse_linear(other, matrix, bias), expected)
        assert_near(sparse_linear(input, values, bias.repeat_interleave(2)[::2]), expected)
        expanded = sparse_linear(input[:1].expand(20, 64), matrix, bias)
    assert_near(expanded, expected[:1].expand(20, 64))


def test_only_what_asks_gets_a_gradient(engine: str, place: torch.device) -> None:
    input, matrix, bias = case(5, (32, 32), (16, 16), device=place)
    with use_backend(engine):
        assert not sparse_linear(input, matrix, bias).requires_grad
        bias.requires_grad_()
        sparse_linear(input, matrix, bias).sum().backward()
        with torch.no_grad():
            assert not sparse_linear(input, matrix, bias, activation="gelu").requires_grad
    torch.testing.assert_close(bias.grad, torch.full((32,), 5.0, device=place))
    assert input.grad is None
    assert matrix.values.grad is None


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_is_that_of_linear(dtype: torch.dtype, device: torch.device) -> None:
    input, matrix, bias = case(5, (32, 48), (16, 16), device=device)
    with torch.autocast(device.type, dtype=dtype):
        output = sparse_linear(input, matrix, bias)
        expected = F.linear(input, matrix.to_dense(), bias)
        same = sparse_linear(input.double(), matrix.to(torch.float64), bias.double())
    assert output.dtype == expected.dtype == dtype
    torch.testing.assert_close(output, expected, rtol=2e-2, atol=2e-2)
    assert same.dtype == torch.float64


@pytest.mark.parametrize("backend", ["cpu", "triton"])
@pytest.mark.parametrize("activation", [None, "gelu"])
def test_operators_are_registered_rightly(
    backend: str, activation: str | None, device: torch.device, request: pytest.FixtureRequest
) -> None:
    if backend == "triton":
        request.getfixturevalue("triton_backend")
    place = device if backend == "triton" else torch.device("cpu")
    input, matrix, bias = case(5, (40, 48), (16, 16), device=place)
    lists = matrix.lists
    asks = activation is None
    tensors = (input.requires_grad_(asks), matrix.values.requires_grad_(asks), bias.requires_grad_(asks))
    indices = (matrix.crow_indices, matrix.col_indices, lists.block_rows)
    across = (lists.ccol_indices, lists.row_indices, lists.positions, lists.column_order)
    arguments = (*tensors, *indices, lists.row_order, *across, 40, activation, backend)
    torch.library.opcheck(torch.ops.sdp_kernels.block_sparse_linear, arguments)
    plain = tuple(tensor.detach() for tensor in tensors[:2])
    for needs in ((True, True), (True, False), (False, True)):
        arguments = (torch.randn(5, 40, device=place), *plain, *indices, *across, *needs, backend)
        torch.library.opcheck(torch.ops.sdp_kernels.block_sparse_linear_backward, arguments)


@pytest.mark.parametrize("backend", ["default", "reference"])
def test_compiles_without_graph_breaks(backend: str) -> None:
    def layer(input: Tensor, values: Tensor, matrix: BlockSparseMatrix, bias: Tensor) -> Tensor:
        with nullcontext() if backend == "default" else use_backend(backend):
            return sparse_linear(input, replace(matrix, values=values), bias, activation="gelu")

    _, matrix, bias = case(1, (32, 48), (16, 16))
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager", dynamic=True)
    for tokens in (3, 8):
        input = torch.randn(tokens, 48)
        gradients = []
        for call in (layer, compiled):
            leaves = input.clone().requires_grad_(), matrix.values.clone().requires_grad_()
            call(*leaves, matrix, bias).square().sum().backward()
            gradients.append([leaf.grad for leaf in leaves])
        torch.testing.assert_close(*gradients)
        with torch.no_grad():
            values = matrix.values
            torch.testing.assert_close(
                compiled(input, values, matrix, bias), layer(input, values, matrix, bias), rtol=1e-5, atol=1e-5
            )


@pytest.mark.parametrize("tokens", [1, 40])
def test_who_records_operators_sees_one(engine: str, place: torch.device, tokens: int) -> None:
    """The function behind it writes where no recorder looks: a graph would return memory as it is."""
    input, matrix, bias = case(tokens, (64, 96), (32, 16), device=place)
    other = torch.randn_like(input)
    with use_backend(engine):
        graph = aside(make_fx(lambda rows: sparse_linear(rows, matrix, bias)))(input)
        assert_near(graph(other), F.linear(other, matrix.to_dense(), bias))


def test_shapes_on_the_meta_device() -> None:
    input, matrix, bias = (each.to("meta") for each in case(5, (64, 96), (32, 16)))
    assert block_sparse_linear(input, matrix, bias, activation="gelu").shape == (5, 64)
    assert masked_linear(input, matrix.to_dense(), torch.ones(64, 96, device="meta").bool(), bias).shape == (5, 64)


def test_double_backward_raises() -> None:
    input, matrix, bias = case(5, (32, 32), (16, 16))
    input.requires_grad_()
    values = matrix.values.requires_grad_()
    output = sparse_linear(input, matrix, bias).square().sum()
    (gradient,) = torch.autograd.grad(output, values, create_graph=True)
    with pytest.raises(RuntimeError, match=r"autograd|backward"):
        torch.autograd.grad(gradient.sum(), input)


@pytest.mark.parametrize("threads", [1, 2])
def test_number_of_threads_changes_nothing(threads: int) -> None:
    input, matrix, bias = case(50, (200, 96), (32, 16))
    expected = sparse_linear(input, matrix, bias)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        assert torch.equal(sparse_linear(input, matrix, bias), expected)
    finally:
        torch.set_num_threads(before)


@pytest.mark.usefixtures("numba")
def test_the_engine_leaves_the_threads_of_torch_alone() -> None:
    code = """
import torch
from sdp_kernels import BlockSparseMatrix, block_sparse_linear
torch.set_num_threads(1)
matrix = BlockSparseMatrix.from_dense(torch.ones(64, 64), (32, 32))
block_sparse_linear(torch.ones(20, 64), matrix)
assert torch.get_num_threads() == 1, torch.get_num_threads()
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


FORKED = """
import os, torch
from sdp_kernels import BlockSparseMatrix, block_sparse_linear
torch.set_num_threads(1)  # as a worker of a DataLoader has it: torch itself waits forever for more
matrix, input = BlockSparseMatrix.from_dense(torch.randn(64, 64), (32, 32)), torch.randn(20, 64)
expected = block_sparse_linear(input, matrix, path="sparse")
child = os.fork()
if child == 0:
    torch.testing.assert_close(block_sparse_linear(input, matrix, path="sparse"), expected)
    os._exit(0)
assert os.waitpid(child, 0)[1] == 0
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork here")
def test_a_forked_process_multiplies_too() -> None:
    done = subprocess.run([sys.executable, "-c", FORKED], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_callers_on_several_threads(engine: str, place: torch.device) -> None:
    if engine == "triton" and place.type == "cpu":
        pytest.skip("Triton's interpreter runs on one thread")
    input, matrix, bias = case(50, (96, 96), (32, 32), device=place)

    def call(tokens: int) -> Tensor:
        with use_backend(engine):
            return sparse_linear(input[:tokens], matrix, bias)

    expected = F.linear(input, matrix.to_dense(), bias)
    with ThreadPoolExecutor(4) as pool:
        for tokens, output in enumerate(pool.map(call, range(20))):
            assert_near(output, expected[:tokens])


@pytest.mark.usefixtures("numba")
def test_more_threads_than_cores() -> None:
    input, matrix, _ = case(9, (64, 48), (32, 4))
    torch.set_num_threads(300)
    try:
        for weight in (matrix, matrix.packed(), matrix.quantize()):
            expected = block_sparse_linear_reference(input, weight)
            torch.testing.assert_close(block_sparse_linear(input, weight, path="sparse"), expected)
    finally:
        torch.set_num_threads(1)


NARROWER_REGISTERS = """
import llvmlite.binding, sys, torch
from sdp_kernels import BlockSparseMatrix, block_sparse_linear
assert "numba" not in sys.modules
features = llvmlite.binding.get_host_cpu_features()
features.update({name: False for name in features if name.startswith("avx512")})
llvmlite.binding.get_host_cpu_features = lambda: features
for block_shape in ((8, 16), (24, 32)):
    matrix = BlockSparseMatrix.from_dense(torch.randn(50, 70), block_shape)
    for tokens in (1, 3, 19):
        input = torch.randn(tokens, 70)
        expected = torch.nn.functional.linear(input, matrix.to_dense())
        torch.testing.assert_close(block_sparse_linear(input, matrix), expected, rtol=0, atol=1e-4)
from sdp_kernels.cpu_engine import register_tile
assert (register_tile.LANES, register_tile.TILE) == ((8, 6) if features.get("avx") else (4, 12))
"""


@pytest.mark.usefixtures("numba")
def test_engine_of_a_cpu_without_the_widest_registers(tmp_path: Path) -> None:
    environment = {**os.environ, "NUMBA_CACHE_DIR": str(tmp_path)}  # what is compiled here must not stay
    done = subprocess.run(
        [sys.executable, "-c", NARROWER_REGISTERS], capture_output=True, text=True, check=False, env=environment
    )
    assert done.returncode == 0, done.stderr


def test_values_beyond_the_shape_are_not_part_of_the_matrix(engine: str, place: torch.device) -> None:
    _, matrix, bias = case(1, (20, 20), (16, 16), 1.0, place)
    input = torch.randn(6, 20, device=place)
    filled = matrix.values.clone()
    filled[1::2, :, 4:] = 1e3
    filled[2:, 4:, :] = 1e3
    assert_is_dense(input, replace(matrix, values=filled), bias, engine)


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"input": torch.randn(3, 47)}, ValueError, r"input must have shape \(..., 48\), got \(3, 47\)"),
        ({"input": torch.tensor(1.0)}, ValueError, r"input must have shape \(..., 48\), got \(\)"),
        ({"input": torch.ones(3, 48, dtype=torch.int64)}, TypeError, "input must be a floating-point tensor"),
        ({"input": torch.randn(3, 48).double()}, ValueError, "weight must have the dtype of input, torch.float64"),
        ({"input": torch.randn(3, 48, device="meta")}, ValueError, "weight must be on the device of input, meta"),
        ({"weight": torch.randn(32, 48)}, TypeError, "weight must be a BlockSparseMatrix, got Tensor"),
        ({"bias": torch.randn(31)}, ValueError, r"bias must have shape \(32,\), got \(31,\)"),
        ({"bias": torch.randn(32).half()}, ValueError, "bias must have the dtype of input, .* got torch.float16"),
        ({"bias": torch.randn(32, device="meta")}, ValueError, "bias must be on the device of input, cpu, got meta"),
        ({"activation": "tanh"}, ValueError, "activation must be one of .* got 'tanh'"),
    ],
)
def test_bad_arguments(changes: dict[str, Any], error: type[Exception], message: str) -> None:
    input, weight, bias = case(3, (32, 48), (16, 16))
    activation = changes.pop("activation", None)
    arguments = {"input": input, "weight": weight, "bias": bias, **changes}
    with pytest.raises(error, match=message):
        sparse_linear(**arguments, activation=activation)


def test_kernels_refuse_what_they_cannot_take(device: torch.device, triton_backend: str) -> None:
    input, matrix, bias = case(3, (32, 48), (16, 16), device=device)
    with use_backend(triton_backend), pytest.raises(NotImplementedError, match=r"dtype torch.float64 is none of"):
        sparse_linear(input.double(), matrix.to(torch.float64), bias.double())
    input, matrix, bias = case(3, (32, 48), (16, 24), device=device)
    with use_backend(triton_backend), pytest.raises(NotImplementedError, match=r"a block side of 24 is none of"):
        sparse_linear(input, matrix, bias)


@pytest.mark.parametrize("block_shape", [(32, 16), (16, 128), (64, 64)])
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_few_tokens_share_a_row_of_blocks(
    device: torch.device, triton_backend: str, block_shape: tuple[int, int], activation: Any
) -> None:
    input, matrix, bias = case(5, (128, 1024 + 8), block_shape, 0.6, device)
    blocks, _, width = matrix.values.shape
    assert choose_splits(8, blocks * width / (matrix.grid[0] * launch.STEP), 132) > 1
    with use_backend(triton_backend):
        got = sparse_linear(input, matrix, bias, activation=activation)
        again = sparse_linear(input, matrix, bias, activation=activation)
    assert_near(got, ACTIVATIONS[activation](F.linear(input, matrix.to_dense(), bias)))
    assert torch.equal(got, again)


def test_token_tiles_run_in_groups(device: torch.device, triton_backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from sdp_kernels.block_sparse_linear import kernel

    monkeypatch.setattr(kernel, "GROUP_BYTES", 2 * 64 * 32 * 4)
    assert_is_dense(*case(300, (64, 32), (16, 16), device=device), triton_backend)


def test_launches_fill_the_device_and_fit_into_it() -> None:
    assert choose_splits(1000, 100, 132) == 1
    assert choose_splits(24, 100, 132) == 16
    assert choose_splits(24, 5, 132) == 2
    assert launch.choose_launch(1, 32, torch.bfloat16, 90) == (16, 4, 4)
    assert launch.choose_launch(4096, 128, torch.bfloat16, 90) == (128, 8, 4)
    assert launch.choose_launch(4096, 128, torch.float32, 120) == (64, 8, 2)
    assert launch.choose_launch(64, 64, torch.float16, 75) == launch.choose_launch(64, 64, torch.float16, 86)
