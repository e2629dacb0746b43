"""What only a GPU shows: CUDA graphs, TF32, large tiles, more entries than 32 bits count, generated code, tuning.

Without one, the same tests run at a small size in Triton's interpreter, so that they are known to be right themselves.
"""

import itertools
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from sdp_kernels import (
    BitMask,
    BlockSparseMatrix,
    aligned_weight_loss,
    block_sparse_linear,
    cosine_distance_loss,
    cross_correlation_loss,
    kl_divergence_loss,
    masked_linear,
    masked_linear_cross_correlation_loss,
    select_mask,
    use_backend,
    zero_,
)
from sdp_kernels.block_sparse_linear import tuning
from sdp_kernels.block_sparse_linear.launch import TUNED, ProductClass
from tests.cuda import Captured, most_of_the_memory, no_waiting

pytestmark = pytest.mark.usefixtures("triton_backend")
ON_GPU = torch.cuda.is_available()
NEEDS_GPU = [pytest.mark.gpu, pytest.mark.skipif(not ON_GPU, reason="no CUDA device")]
SIZES = ["small", pytest.param("large", marks=NEEDS_GPU)]
FLOATS = [torch.float32, pytest.param(torch.bfloat16, marks=NEEDS_GPU)]  # the interpreter cannot add bfloat16 numbers


def random_mask(shape: tuple[int, int], device: torch.device, side: int | None = None) -> BitMask:
    """Half of the blocks of this side kept, or half of all weights."""
    keep = torch.rand(shape if side is None else (shape[0] // side, shape[1] // side)) < 0.5  # the same on any device
    mask = BitMask.from_bool(keep) if side is None else BitMask.from_blocks(keep, (side, side), shape)
    return mask.to(device)


def block_matrix(weight: Tensor, mask: BitMask, side: int) -> BlockSparseMatrix:
    return BlockSparseMatrix.from_dense(weight, (side, side), mask.to_bool())


def with_gradients(call: Callable[[], Tensor], *leaves: Tensor) -> list[Tensor]:
    """What the call returns, and the gradients of its sum with weights."""
    output = call()
    weights = torch.linspace(0.5, 1.5, output.numel(), device=output.device).bfloat16()  # the same in every dtype
    cotangent = weights.to(output.dtype).view(output.shape)
    return [output.detach(), *torch.autograd.grad(output, leaves, cotangent)]


def assert_near(got: list[Tensor], truth: list[Tensor], tolerance: float) -> None:
    """Each within a share of its largest entry."""
    for one, expected in zip(got, truth, strict=True):
        assert one.shape == expected.shape
        assert error(one, expected) <= tolerance


def error(got: Tensor, truth: Tensor) -> float:
    return float((got.double() - truth).abs().max() / truth.abs().max())


# CUDA graphs.

Case = tuple[list[Tensor], list[BitMask], Callable[[], list[Tensor]]]


def losses_of(loss: Callable[..., Tensor], shape: tuple[int, int], dtype: torch.dtype, device: torch.device) -> Case:
    rows = [torch.randn(shape, device=device, dtype=dtype, requires_grad=True) for _ in range(2)]
    sample_weight = torch.rand(shape[0], device=device)
    leaves = [*rows, sample_weight]
    return leaves, [], lambda: with_gradients(lambda: loss(*rows, sample_weight=sample_weight), *rows)


def masked_products(side: int | None, tokens: int, dtype: torch.dtype, device: torch.device) -> Case:
    mask = random_mask((96, 64), device, side)
    leaves = [
        torch.randn(size, device=device, dtype=dtype, requires_grad=True) for size in ((tokens, 64), (96, 64), 96)
    ]
    input, weight, bias = leaves
    return leaves, [mask], lambda: with_gradients(lambda: masked_linear(input, weight, mask, bias), *leaves)


def losses_of_masked_products(dtype: torch.dtype, device: torch.device) -> Case:
    mask = random_mask((32, 32), device, 16)
    shapes = ((20, 32), (32, 32), (32,), (20, 32))
    leaves = [torch.randn(shape, device=device, dtype=dtype, requires_grad=True) for shape in shapes]
    input, weight, bias, teacher = leaves

    def call() -> Tensor:
        return masked_linear_cross_correlation_loss(input, weight, mask, teacher, bias)

    return leaves, [mask], lambda: with_gradients(call, *leaves)


def block_sparse_products(tokens: int, dtype: torch.dtype, device: torch.device) -> Case:
    mask = random_mask((96, 64), device, 16)
    matrix = block_matrix(torch.randn(96, 64, device=device, dtype=dtype), mask, 16)
    shapes = ((tokens, 64), (96,))
    input, bias = (torch.randn(shape, device=device, dtype=dtype, requires_grad=True) for shape in shapes)
    values = matrix.values.requires_grad_()

    def call() -> Tensor:
        return block_sparse_linear(input, matrix, bias, activation="gelu", path="sparse")

    return [input, values, bias], [], lambda: with_gradients(call, input, values, bias)


def zeroing(dtype: torch.dtype, device: torch.device) -> Case:
    """With the copies that it zeroes, so that it starts from the same weights each time; one with strided rows."""
    shapes = ((9, 70), (33, 40), (5, 64))
    weights = [torch.randn(shape, device=device, dtype=dtype) for shape in shapes]
    masks = [random_mask(shape, device) for shape in shapes]
    wide = torch.empty(5, 80, device=device, dtype=dtype)
    zeroed = [torch.empty_like(weights[0]), torch.empty_like(weights[1]), wide[:, 8:72]]

    def call() -> list[Tensor]:
        for target, weight in zip(zeroed, weights, strict=True):
            target.copy_(weight)
        zero_(zeroed, masks)
        return [each.clone() for each in zeroed]

    return weights, masks, call


CASES: dict[str, Callable[[torch.dtype, torch.device], Case]] = {
    "cross-correlation of few rows": lambda *where: losses_of(cross_correlation_loss, (5, 40), *where),
    "cross-correlation": lambda *where: losses_of(partial(cross_correlation_loss, form="matrix"), (20, 17), *where),
    "kl": lambda *where: losses_of(kl_divergence_loss, (5, 70), *where),
    "cosine": lambda *where: losses_of(cosine_distance_loss, (5, 70), *where),
    "masked product": lambda *where: masked_products(None, 20, *where),
    "masked product of blocks": lambda *where: masked_products(16, 20, *where),
    "masked product of one token": lambda *where: masked_products(16, 1, *where),
    "loss of a masked product": losses_of_masked_products,
    "block-sparse product": lambda *where: block_sparse_products(20, *where),
    "block-sparse product of one token": lambda *where: block_sparse_products(1, *where),
    "zeroing": zeroing,
}


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning")  # of numpy, in the interpreter
def test_a_graph_goes_on_with_new_numbers_and_new_masks(
    name: str, dtype: torch.dtype, device: torch.device, triton_backend: str
) -> None:
    leaves, masks, call = CASES[name](dtype, device)
    with use_backend(triton_backend):
        captured = Captured(call)
        before = None
        for step in range(2):
            with torch.no_grad():
                for leaf in leaves:
                    leaf.copy_(torch.rand_like(leaf) + 0.1)
                if step:
                    for mask in masks:
                        side = None if mask.block_shape is None else mask.block_shape[0]
                        mask.copy_(random_mask(mask.shape, device, side))
            got = [each.clone() for each in captured.replay()]
            torch.testing.assert_close(got, call())
            assert before is None or not torch.equal(got[0], before)
            before = got[0]


@pytest.mark.gpu
@pytest.mark.skipif(not ON_GPU, reason="no CUDA device")
@pytest.mark.parametrize("name", CASES)
def test_none_waits_for_the_device(name: str, device: torch.device) -> None:
    _, _, call = CASES[name](torch.float32, device)
    call()  # compiles
    with no_waiting():
        call()


def refused(device: torch.device, monkeypatch: pytest.MonkeyPatch, call: Callable[[], Any], message: str) -> None:
    """By its first line inside of a capture, which goes on; without a GPU, by being told that there is one."""
    rows = torch.ones(3, device=device)

    def captured() -> Tensor:
        with pytest.raises(RuntimeError, match=message):
            call()
        return rows + 1

    if ON_GPU:
        graph = torch.cuda.CUDAGraph()
        call()  # compiles
        with torch.cuda.graph(graph):
            result = captured()
        rows.zero_()
        graph.replay()
        assert result.tolist() == [1.0] * 3
    else:
        for module in ("alignment.kernel", "mask_selection.op"):
            monkeypatch.setattr(f"sdp_kernels.{module}.is_captured", lambda _: True)
        captured()
        monkeypatch.undo()
    call()  # nothing was harmed


@pytest.mark.parametrize("structure", ["unstructured", "n:m"])
def test_selection_refuses_to_be_captured(
    structure: str, device: torch.device, triton_backend: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    scores = torch.rand(8, 40, device=device)
    options: dict[str, Any] = {"structure": structure, "n": 2, "m": 4} if structure == "n:m" else {"sparsity": 0.5}
    with use_backend(triton_backend):
        refused(device, monkeypatch, lambda: select_mask(scores, **options), "no CUDA graph can hold it")


def test_alignment_refuses_to_be_captured(
    device: torch.device, triton_backend: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    weight, reference = torch.rand(2, 8, 40, device=device)
    with use_backend(triton_backend):
        refused(device, monkeypatch, lambda: aligned_weight_loss([weight], [reference]), "no CUDA graph can hold it")


@pytest.mark.skipif(ON_GPU, reason="a backward pass alone would take the stream of its forward pass into the capture")
def test_the_backward_of_alignment_refuses_to_be_captured(
    device: torch.device, triton_backend: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    weight, reference = torch.rand(2, 8, 40, device=device)
    weight.requires_grad_()
    with use_backend(triton_backend):
        loss = aligned_weight_loss([weight], [reference])
    call = partial(torch.autograd.grad, loss, weight, retain_graph=True)
    refused(device, monkeypatch, call, "no CUDA graph can hold it")


# Products.


def product_case(size: str, dtype: torch.dtype, device: torch.device) -> tuple[list[Tensor], BitMask]:
    """Input, weight and bias, and a mask of blocks of 128 x 128."""
    tokens, outputs, inputs = (4099, 1024, 768) if size == "large" else (70, 256, 128)
    shapes = ((tokens, inputs), (outputs, inputs), (outputs,))
    return [torch.randn(shape, device=device).to(dtype) for shape in shapes], random_mask(shapes[1], device, 128)


def products(tensors: list[Tensor], mask: BitMask, which: str) -> list[Tensor]:
    """The result and the gradients of input, weight and bias; where pruned, the weight's are zero."""
    input, weight, bias = (tensor.detach().requires_grad_() for tensor in tensors)
    if which == "masked":
        return with_gradients(lambda: masked_linear(input, weight, mask, bias), input, weight, bias)
    if which == "reference":
        return with_gradients(
            lambda: F.linear(input, torch.where(mask.to_bool(), weight, 0), bias), input, weight, bias
        )
    matrix = block_matrix(weight.detach(), mask, 128)
    values = matrix.values.requires_grad_()
    output, of_input, of_values, of_bias = with_gradients(
        lambda: block_sparse_linear(input, matrix, bias, path="sparse"), input, values, bias
    )
    return [output, of_input, block_matrix_gradient(matrix, of_values), of_bias]


def block_matrix_gradient(matrix: BlockSparseMatrix, gradient: Tensor) -> Tensor:
    indices = matrix.crow_indices, matrix.col_indices
    return BlockSparseMatrix(gradient, *indices, matrix.shape, matrix.block_shape).to_dense()


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("which", ["masked", "block-sparse"])
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_large_blocks_and_many_tokens(
    which: str, size: str, dtype: torch.dtype, device: torch.device, triton_backend: str
) -> None:
    tensors, mask = product_case(size, dtype, device)
    with use_backend(triton_backend):
        got = products(tensors, mask, which)
    truth = products([tensor.double() for tensor in tensors], mask, "reference")
    assert_near(got, truth, {torch.float32: 1e-5, torch.float16: 2e-3}.get(dtype, 1e-2))


@pytest.fixture(params=["tf32", "ieee"])
def precision(request: pytest.FixtureRequest) -> Iterator[str]:
    """Torch's switch set to this; its switches cannot be deleted, as monkeypatch would."""
    before, torch.backends.cuda.matmul.fp32_precision = torch.backends.cuda.matmul.fp32_precision, request.param
    yield request.param
    torch.backends.cuda.matmul.fp32_precision = before


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("which", ["masked", "block-sparse"])
def test_float32_products_follow_the_switch_of_torch(
    which: str, size: str, precision: str, device: torch.device, triton_backend: str
) -> None:
    """TF32 keeps the ten digits of float16; without it none may be lost."""
    tensors, mask = product_case(size, torch.float32, device)
    with use_backend(triton_backend):
        got = products(tensors, mask, which)
    truth = products([tensor.double() for tensor in tensors], mask, "reference")
    rounded = ON_GPU and precision == "tf32" and torch.cuda.get_device_capability() >= (8, 0)
    for one, expected in zip(got[:3], truth[:3], strict=True):  # the bias takes no product
        assert error(one, expected) <= (3e-3 if rounded else 1e-5)
        assert error(one, expected) > 2e-5 or not rounded


# More entries than 32 bits count. Only the last rows are compared; the rest is zero or does not count.

LAST = 3  # rows


def many_rows(size: str, columns: int) -> int:
    """So many that the rows compared lie beyond 2**31 entries."""
    return 2**31 // columns + 5 if size == "large" else 40


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("loss", [kl_divergence_loss, cosine_distance_loss], ids=["kl", "cosine"])
def test_losses_of_more_rows_than_32_bits_count(
    loss: Callable[..., Tensor], size: str, device: torch.device, triton_backend: str
) -> None:
    columns = 4096 if size == "large" else 70
    rows = many_rows(size, columns)
    with enough_memory(size, 8 * rows * columns):
        student = torch.zeros(rows, columns, dtype=torch.float16, device=device)
        teacher = torch.zeros_like(student)
        for each in (student, teacher):
            each[-LAST:] = torch.randn(LAST, columns, device=device).half()
        weight = torch.zeros(rows, device=device)
        weight[-LAST:] = 1
        student.requires_grad_()
        with use_backend(triton_backend):
            value = loss(student, teacher, sample_weight=weight)
            (gradient,) = torch.autograd.grad(value, student)
        leaf = student.detach()[-LAST:].double().requires_grad_()
        expected = loss(leaf, teacher[-LAST:].double())
        torch.testing.assert_close(value.double(), expected, rtol=1e-4, atol=1e-5)
        (want,) = torch.autograd.grad(expected, leaf)
        assert error(gradient[-LAST:], want) < 2e-3
        assert not gradient[:LAST].any()


@pytest.mark.parametrize("size", SIZES)
def test_correlations_of_more_features_than_32_bits_count(size: str, device: torch.device, triton_backend: str) -> None:
    """All but the last features are dead, which the teacher's target leaves out."""
    rows, alive = 64 if size == "large" else 16, 50
    dim = many_rows(size, rows) + alive
    with enough_memory(size, 20 * rows * dim):
        pair = [
            torch.zeros(rows, dim, dtype=torch.bfloat16 if ON_GPU else torch.float16, device=device) for _ in range(2)
        ]
        for each in pair:
            each[:, -alive:] = torch.randn(rows, alive, device=device).to(each.dtype)
        student, teacher = pair[0].requires_grad_(), pair[1]
        with use_backend(triton_backend):
            value = cross_correlation_loss(student, teacher, target="teacher", off_diagonal_weight=0.1)
            (gradient,) = torch.autograd.grad(value, student)
        leaf = student.detach()[:, -alive:].double().requires_grad_()
        expected = cross_correlation_loss(leaf, teacher[:, -alive:].double(), target="teacher", off_diagonal_weight=0.1)
        torch.testing.assert_close(value.double(), expected, rtol=2e-2, atol=1e-3)
        (want,) = torch.autograd.grad(expected, leaf)
        assert error(gradient[:, -alive:], want) < 3e-2
        assert not gradient[:, :alive].any() or dim < 2 * alive


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("wide", ["input", "output"])
@pytest.mark.parametrize("which", ["unstructured", "blocks", "block-sparse"])
def test_products_of_more_entries_than_32_bits_count(
    which: str, wide: str, size: str, device: torch.device, triton_backend: str
) -> None:
    wide_side = 4096 if size == "large" else 96
    outputs, inputs = (wide_side, 32) if wide == "output" else (32, wide_side)
    tokens = many_rows(size, wide_side)
    with enough_memory(size, 10 * tokens * wide_side):
        mask = random_mask((outputs, inputs), device, None if which == "unstructured" else 16)
        weight = torch.randn(outputs, inputs, device=device).half()
        input = torch.zeros(tokens, inputs, device=device, dtype=torch.float16)
        input[-LAST:] = torch.randn(LAST, inputs, device=device).half()
        cotangent = torch.zeros(tokens, outputs, device=device, dtype=torch.float16)
        cotangent[-LAST:] = torch.randn(LAST, outputs, device=device).half()
        exact = [
            each.detach().double().requires_grad_() for each in (input[-LAST:], torch.where(mask.to_bool(), weight, 0))
        ]
        expected = F.linear(*exact)
        want = [expected.detach(), *torch.autograd.grad(expected, exact, cotangent[-LAST:].double())]
        want[2] = torch.where(mask.to_bool(), want[2], 0)
        input.requires_grad_()
        with use_backend(triton_backend):
            if which == "block-sparse":
                matrix = block_matrix(weight, mask, 16)
                leaf = matrix.values.requires_grad_()
                output = block_sparse_linear(input, matrix, path="sparse")
            else:
                leaf = weight.requires_grad_()
                output = masked_linear(input, weight, mask)
            of_input, of_weight = torch.autograd.grad(output, (input, leaf), cotangent)
        if which == "block-sparse":
            of_weight = block_matrix_gradient(matrix, of_weight)
        assert_near([output.detach()[-LAST:], of_input[-LAST:], of_weight], want, 2e-3)
        assert not output.detach()[:LAST].any()
        assert not of_input[:LAST].any()


def enough_memory(size: str, needed: int) -> Any:
    """Alone with that much memory of the GPU, or skip the test."""
    return _enough_memory(needed) if size == "large" else nullcontext()


@contextmanager
def _enough_memory(needed: int) -> Iterator[None]:
    with most_of_the_memory(needed) as enough:
        if not enough:
            pytest.skip(f"less than {needed / 2**30:.0f} GiB of the GPU are free")
        yield


# Generated code and tuning.


@pytest.mark.parametrize(
    "compiler",
    ["aot_eager", pytest.param("inductor", marks=NEEDS_GPU)],
)
@pytest.mark.parametrize("loss", [cross_correlation_loss, kl_divergence_loss, cosine_distance_loss])
@pytest.mark.filterwarnings("ignore:TensorFloat32 tensor cores:UserWarning")  # of inductor, which would have it so
@pytest.mark.filterwarnings("default:.*should not be instantiated:DeprecationWarning")  # of torch.compile
def test_losses_inside_of_compiled_code(
    loss: Callable[..., Tensor], compiler: str, device: torch.device, triton_backend: str
) -> None:
    """With operations before and after, whose code is generated."""

    def call(student: Tensor, teacher: Tensor) -> Tensor:
        return 2 * loss(student.tanh(), 3 * teacher) + student.square().mean()

    compiled = torch.compile(call, fullgraph=True, backend=compiler)
    teacher = torch.randn(20, 70, device=device)
    student = torch.randn(20, 70, device=device, requires_grad=True)
    with use_backend(triton_backend):
        results = [with_gradients(lambda each=each: each(student, teacher), student) for each in (call, compiled)]
    torch.testing.assert_close(*results, rtol=1e-4, atol=1e-5)


def test_a_table_that_is_tuned_here_is_used(
    tmp_path: Path, device: torch.device, triton_backend: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Really timed, for few tokens and few candidates."""
    proposed = tuning.candidates
    monkeypatch.setattr(tuning, "candidates", lambda *sizes: itertools.islice(proposed(*sizes), 3))
    mask = random_mask((64, 128), device, 16)
    weight = block_matrix(torch.randn(64, 128, device=device), mask, 16)
    input = torch.randn(5, 128, device=device)
    TUNED.clear()
    try:
        found = tuning.tune(weight, 5, repeats=2)
        assert found.milliseconds > 0
        tuning.save(tmp_path / "table.json", [found], device)
        assert tuning.load(tmp_path / "table.json", device) == 1
        assert {ProductClass.of(5, weight.shape, (16, 16), torch.float32): found.best} == TUNED
        with use_backend(triton_backend):
            output = block_sparse_linear(input, weight, path="sparse")
    finally:
        TUNED.clear()
    torch.testing.assert_close(output, F.linear(input, weight.to_dense()), rtol=1e-4, atol=1e-4)
