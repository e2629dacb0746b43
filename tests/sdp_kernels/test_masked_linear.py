"""What is special to the masked linear map: bit equality, what it saves, gates, zeroing in place."""

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from sdp_kernels import BitMask, masked_linear, zero_
from sdp_kernels.masked_linear import masking
from sdp_kernels.masked_linear.reference import masked_linear_reference


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
        torch.library.opcheck(torch.ops.sdp_kernels.masked_linear, (*arguments, dense, dtype), atol=1e-2, rtol=1e-2)


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
