"""What is special to the masked linear map: bit equality, what it saves, gates, zeroing in place."""

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from sdp_kernels import BitMask, masked_linear, use_backend, zero_
from sdp_kernels.masked_linear import arguments, cpu
from sdp_kernels.masked_linear.reference import masked_linear_reference
from sdp_kernels.masks import masking


def problem(dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Input (2, 3, 40), weight (12, 40), mask and bias."""
    mask = torch.rand(12, 40) < 0.3
    return (
        torch.randn(2, 3, 40, dtype=dtype).requires_grad_(),
        torch.randn(12, 40, dtype=dtype).requires_grad_(),
        mask,
        torch.randn(12, dtype=dtype).requires_grad_(),
    )


@pytest.mark.parametrize("packed", [True, False])
@pytest.mark.parametrize("with_bias", [True, False])
@pytest.mark.parametrize("autocast", [True, False])
def test_equals_the_dense_product_bit_for_bit(packed: bool, with_bias: bool, autocast: bool) -> None:
    input, weight, mask, bias = problem()
    used_mask = BitMask.from_bool(mask) if packed else mask
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
        output = masked_linear(input, weight, used_mask, bias if with_bias else None)
        expected = F.linear(input, torch.where(mask, weight, 0), bias if with_bias else None)
    assert output.dtype == expected.dtype == (torch.bfloat16 if autocast else torch.float32)
    assert torch.equal(output, expected)
    leaves = (input, weight, bias) if with_bias else (input, weight)
    cotangent = torch.randn_like(expected)
    gradients = torch.autograd.grad(output, leaves, cotangent)
    for got, want in zip(gradients, torch.autograd.grad(expected, leaves, cotangent), strict=True):
        assert got.dtype == want.dtype
        torch.testing.assert_close(got, want)


def test_autocast_leaves_float64_alone() -> None:
    input, weight, mask, bias = problem(torch.float64)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert masked_linear(input, weight, mask, bias).dtype == F.linear(input, weight, bias).dtype


@pytest.mark.parametrize("fill", [True, False])
def test_full_and_empty_masks(fill: bool) -> None:
    input, weight, _, bias = problem()
    mask = torch.full((12, 40), fill)
    output = masked_linear(input, weight, BitMask.from_bool(mask), bias)
    assert torch.equal(output, F.linear(input, weight if fill else torch.zeros_like(weight), bias))


def test_pruned_values_may_be_anything() -> None:
    input, weight, mask, bias = problem()
    expected = masked_linear(input, weight, mask, bias)
    poisoned = torch.where(mask, weight, torch.nan).detach().requires_grad_()
    output = masked_linear(input, poisoned, mask, bias)
    assert torch.equal(output, expected)
    output.sum().backward()
    assert poisoned.grad is not None
    assert (poisoned.grad[~mask] == 0).all()
    assert poisoned.grad.isfinite().all()


def test_dense_gradient_reaches_pruned_weights() -> None:
    input, weight, mask, bias = problem()
    (gradient,) = torch.autograd.grad(masked_linear(input, weight, mask, bias, gradient="dense").sum(), weight)
    torch.testing.assert_close(gradient, input.detach().flatten(0, 1).sum(0).expand(12, 40))
    assert (gradient[~mask] != 0).all()


@pytest.mark.parametrize("gradient", ["masked", "dense"])
def test_block_gate_collects_the_scores_of_blocks(gradient: str) -> None:
    input, weight, mask, _ = problem(torch.float64)
    gate = torch.ones(3, 4, dtype=torch.float64, requires_grad=True)
    output = masked_linear(input, weight, mask, gradient=gradient, block_gate=gate)
    assert torch.equal(output, masked_linear(input, weight, mask))
    cotangent = torch.randn_like(output)
    scores, with_gate = torch.autograd.grad(output, (gate, weight), cotangent)
    dense = cotangent.flatten(0, 1).T @ input.detach().flatten(0, 1)
    torch.testing.assert_close(scores, (dense * weight.detach()).view(3, 4, 4, 10).sum((1, 3)))
    plain = masked_linear(input, weight, mask, gradient=gradient)
    assert torch.equal(with_gate, torch.autograd.grad(plain, weight, cotangent)[0])
    reference = masked_linear_reference(input, weight, mask, gradient=gradient, block_gate=gate)
    torch.testing.assert_close(scores, torch.autograd.grad(reference, gate, cotangent)[0])


def test_gate_works_with_a_frozen_weight() -> None:
    input, weight, mask, _ = problem()
    gate = torch.ones(1, 1, requires_grad=True)
    masked_linear(input.detach(), weight.detach(), mask, block_gate=gate).sum().backward()
    assert gate.grad is not None


def test_saves_nothing_of_the_weights_size_but_the_weight() -> None:
    input, weight, mask, bias = problem()
    packed = BitMask.from_bool(mask)
    saved: list[Tensor] = []

    def pack(tensor: Tensor) -> Tensor:
        saved.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        masked_linear(input, weight, packed, bias)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            masked_linear(input, weight, packed, bias)
    large = [tensor for tensor in saved if tensor.numel() >= weight.numel()]
    assert large
    assert all(tensor.data_ptr() == weight.data_ptr() for tensor in large)


@pytest.mark.parametrize("packed", [True, False])
@pytest.mark.parametrize("with_extras", [True, False])
def test_operator_is_registered_rightly(packed: bool, with_extras: bool) -> None:
    input, weight, mask, bias = problem()
    words = BitMask.from_bool(mask).words if packed else mask
    gate = torch.ones(3, 4, requires_grad=True)
    arguments = (input, weight, words, bias if with_extras else None, gate if with_extras else None)
    for dense, dtype in ((False, None), (True, torch.bfloat16)):
        rest: tuple[Any, ...] = ([], 0, 0, dense, dtype, "cpu")
        torch.library.opcheck(torch.ops.sdp_kernels.masked_linear, (*arguments, *rest), atol=1e-2, rtol=1e-2)


def test_the_operator_is_seen_where_something_watches() -> None:
    """Elsewhere its function is called directly; neither has second derivatives."""
    seen: list[str] = []

    class Recorder(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            seen.append(str(func))
            return func(*args, **kwargs or {})

    input, weight, mask, bias = problem()
    input, weight = input.requires_grad_(), weight.requires_grad_()
    with Recorder():
        watched = masked_linear(input, weight, mask, bias)
    assert "sdp_kernels.masked_linear.default" in seen
    output = masked_linear(input, weight, mask, bias)
    assert torch.equal(output, watched)
    for result in (output, watched):
        (gradient,) = torch.autograd.grad(result.square().sum(), input, create_graph=True)
        with pytest.raises(RuntimeError, match=r"differentiate twice|no autograd formula"):
            gradient.sum().backward()


def test_compiles_without_graph_breaks() -> None:
    input, weight, mask, bias = problem()
    words = BitMask.from_bool(mask).words

    def call(input: Tensor, weight: Tensor, words: Tensor) -> Tensor:
        return masked_linear(input, weight, BitMask(words, (12, 40)), bias, gradient="dense").sum()

    compiled = torch.compile(call, fullgraph=True, backend="aot_eager")
    expected = torch.autograd.grad(call(input, weight, words), (input, weight))
    for got, want in zip(torch.autograd.grad(compiled(input, weight, words), (input, weight)), expected, strict=True):
        torch.testing.assert_close(got, want)


def test_zero_in_place() -> None:
    weights = [torch.randn(5, 7, requires_grad=True), torch.randn(3, 40, dtype=torch.float16)]
    masks = [torch.rand(5, 7) < 0.5, torch.rand(3, 40) < 0.5]
    before = [weight.detach().clone() for weight in weights]
    with torch.no_grad():
        weights[0][~masks[0]] = torch.nan
        weights[1][~masks[1]] = -torch.inf
    version = weights[0]._version
    zero_(weights, [masks[0], BitMask.from_bool(masks[1])])
    assert weights[0]._version > version, "autograd must see that saved values changed"
    for weight, mask, old in zip(weights, masks, before, strict=True):
        assert torch.equal(weight[mask], old[mask])
        assert (weight[~mask] == 0).all()
        assert not torch.signbit(weight[~mask]).any()
    assert weights[0].is_leaf
    assert weights[0].requires_grad
    assert weights[0].grad_fn is None


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_zero_leaves_kept_bits_alone(dtype: torch.dtype) -> None:
    weight = torch.tensor([[-0.0, torch.nan, -torch.inf, 1e-7, -3.0, -0.0, torch.nan, -1.0]], dtype=dtype)
    before = weight.clone()
    mask = torch.tensor([[True] * 4 + [False] * 4])
    zero_(weight, mask)
    assert torch.equal(
        weight.view(torch.int16)[:, : weight.itemsize * 2], before.view(torch.int16)[:, : weight.itemsize * 2]
    )
    assert not weight.view(torch.int16)[:, weight.itemsize * 2 :].any()


def test_zero_in_compiled_code() -> None:
    weight, mask = torch.randn(5, 7), torch.rand(5, 7) < 0.5
    torch.compile(zero_, fullgraph=True, backend="aot_eager")(weight, mask)
    assert torch.equal(weight != 0, mask)


def test_zero_one_weight_in_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(masking, "CHUNK_ELEMENTS", 14)
    weight, mask = torch.randn(5, 7), torch.rand(5, 7) < 0.5
    strided = weight.clone().T.contiguous().T
    zero_(weight, mask)
    zero_(strided, BitMask.from_bool(mask))
    assert torch.equal(weight, strided)
    assert torch.equal(weight != 0, mask)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"input": torch.ones(3, 39)}, ValueError, r"got weight \(12, 40\) and input \(3, 39\)"),
        ({"input": torch.ones(3, 40).int()}, TypeError, "input .* torch.int32"),
        ({"mask": torch.ones(12, 40)}, TypeError, "mask must be a bool tensor or a BitMask, got torch.float32"),
        ({"mask": None}, TypeError, "mask .* got NoneType"),
        ({"mask": torch.ones(12, 39).bool()}, ValueError, r"mask must have shape \(12, 40\), got \(12, 39\)"),
        ({"bias": torch.ones(40)}, ValueError, r"bias must have shape \(12,\), got \(40,\)"),
        ({"bias": torch.ones(12, device="meta")}, ValueError, "bias must be on the device of input, cpu, got meta"),
        ({"block_gate": torch.ones(6, 4, device="meta")}, ValueError, "block_gate must be on the device of input"),
        ({"gradient": "none"}, ValueError, "gradient must be one of .* got 'none'"),
        ({"block_gate": torch.ones(5, 4)}, ValueError, r"block_gate of shape \(5, 4\) must divide"),
        ({"block_gate": torch.ones(4)}, ValueError, r"block_gate must be a matrix, got shape \(4,\)"),
    ],
)
def test_bad_arguments(change: dict[str, Any], error: type[Exception], message: str) -> None:
    input, weight, mask, bias = problem()
    with pytest.raises(error, match=message):
        masked_linear(**({"input": input, "weight": weight, "mask": mask, "bias": bias} | change))


def test_zero_rejects_unpaired_masks() -> None:
    with pytest.raises(ValueError, match="masks must be as many as weights, 2, got 1"):
        zero_([torch.ones(2, 2)] * 2, [torch.ones(2, 2).bool()])
    with pytest.raises(ValueError, match=r"masks\[1\] must have shape \(2, 3\), got \(2, 2\)"):
        zero_([torch.ones(2, 2), torch.ones(2, 3)], [torch.ones(2, 2).bool()] * 2)


def blocks_problem(
    block_shape: tuple[int, int], grid: tuple[int, int], tokens: int, dtype: torch.dtype, device: torch.device
) -> tuple[Tensor, Tensor, BitMask, Tensor]:
    """Input, weight, a mask of blocks of which the first row and the last column are empty, and bias."""
    keep = torch.rand(grid) < 0.4
    keep[0], keep[:, -1] = False, False
    shape = grid[0] * block_shape[0], grid[1] * block_shape[1]
    input, weight, bias = torch.randn(tokens, shape[1]), torch.randn(shape), torch.randn(shape[0])
    leaves = [tensor.to(device, dtype).requires_grad_() for tensor in (input, weight, bias)]
    return leaves[0], leaves[1], BitMask.from_blocks(keep, block_shape, shape).to(device), leaves[2]


def results(call: Any, leaves: tuple[Tensor, ...], **options: Any) -> list[Tensor]:
    """Output and gradients."""
    output = call(**options)
    cotangent = torch.linspace(0.5, 1.5, output.numel(), device=output.device).view(output.shape).to(output.dtype)
    return [output.detach(), *torch.autograd.grad(output, leaves, cotangent)]


def assert_near_truth(got: list[Tensor], truth: list[Tensor]) -> None:
    for result, true in zip(got, truth, strict=True):
        tolerance = {torch.float32: 1e-5, torch.float16: 4e-3, torch.bfloat16: 3e-2}.get(result.dtype, 1e-12)
        assert result.isfinite().all()
        assert (result.double() - true).abs().max() <= tolerance * true.abs().max().clamp_min(1e-3)


BLOCKS = [((16, 16), (3, 5), 5), ((32, 16), (4, 3), 70), ((64, 128), (3, 2), 1), ((32, 32), (5, 3), 19)]


@pytest.mark.parametrize(("block_shape", "grid", "tokens"), BLOCKS)
@pytest.mark.parametrize("gradient", ["masked", "dense"])
@pytest.mark.parametrize("with_gate", [True, False])
@pytest.mark.parametrize("backend", ["cpu", "triton"])
@pytest.mark.usefixtures("nan_filled_memory")
def test_block_products(
    block_shape: tuple[int, int],
    grid: tuple[int, int],
    tokens: int,
    gradient: str,
    with_gate: bool,
    backend: str,
    device: torch.device,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Values and all gradients, with pruned weights that are NaN where they are not asked for."""
    monkeypatch.setattr(cpu, "MOST_DENSE", {True: 1.0, False: 1.0})
    device = torch.device("cpu") if backend == "cpu" else device
    for dtype in (torch.float32, torch.float16) if backend == "triton" else (torch.float32, torch.float64):
        input, weight, mask, bias = blocks_problem(block_shape, grid, tokens, dtype, device)
        leaves = [input, weight, bias]
        options: dict[str, Any] = {"gradient": gradient}
        if with_gate:
            options["block_gate"] = torch.ones(grid, device=device, dtype=dtype, requires_grad=True)
            leaves.append(options["block_gate"])
        else:
            with torch.no_grad():
                weight[~mask.to_bool()] = torch.nan
        with use_backend(backend):
            got = results(masked_linear, tuple(leaves), input=input, weight=weight, mask=mask, bias=bias, **options)
        exact = {
            name: value.detach().double().requires_grad_()
            for name, value in {"input": input, "weight": weight.nan_to_num(), "bias": bias}.items()
        }
        if with_gate:
            exact["block_gate"] = torch.ones(grid, device=device, dtype=torch.float64, requires_grad=True)
        truth = results(masked_linear_reference, tuple(exact.values()), mask=mask.to_bool(), gradient=gradient, **exact)
        assert_near_truth(got, truth)


@pytest.mark.parametrize("packed", [True, False])
@pytest.mark.parametrize("tokens", [0, 1, 40])
@pytest.mark.parametrize("few", [True, False])
@pytest.mark.parametrize("shape", [(1, 1), (17, 33), (70, 130)])
@pytest.mark.usefixtures("nan_filled_memory")
def test_kernels_of_masks_without_structure(
    packed: bool,
    tokens: int,
    few: bool,
    shape: tuple[int, int],
    device: torch.device,
    triton_backend: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Masked in registers and by a copy; an empty row, pruned weights that are NaN."""
    if not few:
        monkeypatch.setattr(arguments, "FEW_TOKENS", -1)
    mask = torch.rand(shape) < 0.5
    mask[-1] = False
    for dtype in (torch.float32, torch.float16):
        tensors = torch.randn(tokens, shape[1]), torch.randn(shape), torch.randn(shape[0])
        input, weight, bias = (tensor.to(device, dtype).requires_grad_() for tensor in tensors)
        with torch.no_grad():
            weight[~mask.to(device)] = torch.nan
        used = BitMask.from_bool(mask.to(device)) if packed else mask.to(device)
        with use_backend(triton_backend):
            got = results(masked_linear, (input, weight, bias), input=input, weight=weight, mask=used, bias=bias)
        exact = [tensor.detach().double().requires_grad_() for tensor in (input, weight.nan_to_num(), bias)]
        names = dict(zip(("input", "weight", "bias"), exact, strict=True))
        truth = results(masked_linear_reference, tuple(exact), mask=mask.to(device), **names)
        if tokens:
            assert_near_truth(got, truth)
        assert got[2].shape == shape
        assert not got[2][~mask].any()


@pytest.mark.parametrize("structure", ["words", "blocks"])
def test_kernels_under_autocast_and_in_bfloat16(structure: str, device: torch.device, triton_backend: str) -> None:
    """The interpreter cannot add bfloat16 numbers, so there it is float16."""
    dtype = torch.float16 if device.type == "cpu" else torch.bfloat16
    input, weight, mask, bias = blocks_problem((16, 16), (4, 3), 20, torch.float32, device)
    used = mask if structure == "blocks" else BitMask(mask.words, mask.shape)
    with use_backend(triton_backend), torch.autocast(device.type, dtype=dtype):
        output = masked_linear(input, weight, used, bias)
    gradients = torch.autograd.grad(output, (input, weight, bias), torch.ones_like(output))
    assert output.dtype == dtype
    assert [gradient.dtype for gradient in gradients] == [torch.float32] * 3
    exact = [tensor.detach().double().requires_grad_() for tensor in (input, weight, bias)]
    expected = F.linear(exact[0], torch.where(mask.to_bool(), exact[1], 0), exact[2])
    truth = torch.autograd.grad(expected, exact, torch.ones_like(expected))
    for got, true in zip((output.detach(), *gradients), (expected.detach(), *truth), strict=True):
        assert (got.double() - true).abs().max() <= 2e-2 * true.abs().max()


@pytest.mark.parametrize("backend", ["cpu", "triton"])
@pytest.mark.parametrize("structure", ["words", "blocks"])
def test_backends_save_nothing_of_the_weights_size_but_the_weight(
    structure: str, backend: str, device: torch.device
) -> None:
    device = torch.device("cpu") if backend == "cpu" else device
    input, weight, mask, bias = blocks_problem((16, 16), (4, 6), 3, torch.float32, device)
    saved: list[Tensor] = []
    used = mask if structure == "blocks" else BitMask(mask.words, mask.shape)

    def pack(tensor: Tensor) -> Tensor:
        saved.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor), use_backend(backend):
        masked_linear(input, weight, used, bias)
    large = [tensor for tensor in saved if tensor.numel() >= weight.numel() // 16]
    assert large
    assert all(tensor.data_ptr() == weight.data_ptr() for tensor in large)


def test_a_new_mask_in_place_needs_no_new_compilation() -> None:
    input, weight, mask, bias = blocks_problem((16, 16), (6, 8), 9, torch.float32, torch.device("cpu"))
    compilations = []

    def backend(graph: Any, inputs: Any) -> Any:
        compilations.append(graph)
        return graph.forward

    compiled = torch.compile(lambda mask: masked_linear(input, weight, mask, bias), fullgraph=True, backend=backend)
    before = compiled(mask)
    other = BitMask.from_blocks(torch.rand(6, 8) < 0.2, (16, 16), mask.shape)
    mask.copy_(other)
    after = compiled(mask)
    assert len(compilations) == 1
    assert not torch.allclose(before, after)
    expected = F.linear(input, torch.where(other.to_bool(), weight, 0), bias)
    torch.testing.assert_close(after, expected, rtol=1e-4, atol=1e-4)


def test_operator_with_lists_is_registered_rightly() -> None:
    input, weight, mask, bias = blocks_problem((16, 16), (6, 8), 9, torch.float32, torch.device("cpu"))
    assert mask.lists is not None
    lists = [mask.lists.crow_indices, mask.lists.col_indices, mask.lists.ccol_indices, mask.lists.row_indices]
    for dense in (True, False):
        arguments = (input, weight, mask.words, bias, None, lists, 16, 16, dense, None, "cpu")
        torch.library.opcheck(torch.ops.sdp_kernels.masked_linear, arguments, atol=1e-4, rtol=1e-4)


def test_zeroing_kernel_of_many_tensors(device: torch.device, triton_backend: str) -> None:
    """One launch for floats of one size: bits and bools, strided rows, transposed, nothing at all."""
    wide, *others = (torch.randn(shape, device=device) for shape in ((9, 700), (5, 70), (33, 6), (7, 33), (0, 4)))
    weights = [others[0], wide[:, 3:600], others[1].T, others[2].half(), others[3]]
    masks = [torch.rand(weight.shape, device=device) < 0.5 for weight in weights]
    expected = [torch.where(mask, weight, 0) for weight, mask in zip(weights, masks, strict=True)]
    outside = wide[:, :3].clone(), wide[:, 600:].clone()
    for weight, mask in zip(weights, masks, strict=True):
        weight[~mask] = torch.nan
    before = [weight._version for weight in weights]
    with use_backend(triton_backend):
        zero_([], [])
        zero_(weights, [masks[0], BitMask.from_bool(masks[1]), *masks[2:3], BitMask.from_bool(masks[3]), masks[4]])
    assert all(weight._version > version for weight, version in zip(weights, before, strict=True))
    for weight, want in zip(weights, expected, strict=True):
        assert torch.equal(weight, want)
        assert not torch.signbit(weight[want == 0]).any()
    assert torch.equal(wide[:, :3], outside[0])
    assert torch.equal(wide[:, 600:], outside[1])


@pytest.mark.usefixtures("triton_backend")
def test_zeroing_operator_is_registered_rightly(device: torch.device) -> None:
    weights = [torch.randn(5, 7, device=device), torch.randn(3, 40, device=device)]
    masks = [torch.rand(weight.shape, device=device) < 0.5 for weight in weights]
    masks[1] = BitMask.from_bool(masks[1]).words
    torch.library.opcheck(torch.ops.sdp_kernels.zero_, (weights, masks))


def test_zeroing_kernel_in_compiled_code(device: torch.device, triton_backend: str) -> None:
    weights = [torch.randn(5, 7, device=device), torch.randn(3, 40, device=device)]
    masks = [torch.rand(weight.shape, device=device) < 0.5 for weight in weights]
    with use_backend(triton_backend):
        torch.compile(zero_, fullgraph=True, backend="aot_eager")(weights, masks)
    for weight, mask in zip(weights, masks, strict=True):
        assert torch.equal(weight != 0, mask)
