"""The loss of a masked linear map: it equals the two operations in sequence, in every option."""

from typing import Any

import pytest
import torch
from torch import Tensor

from sdp_kernels import (
    BitMask,
    cross_correlation_loss,
    masked_linear,
    masked_linear_cross_correlation_loss,
    use_backend,
)

Problem = dict[str, Any]


def problem(device: torch.device, *, blocks: bool = False) -> Problem:
    """A batch of 9 through a weight (48, 32), half of it pruned, and a teacher near the dense output."""
    keep = torch.rand(3, 2) < 0.5 if blocks else torch.rand(48, 32) < 0.5
    mask = BitMask.from_blocks(keep, (16, 16), (48, 32)) if blocks else BitMask.from_bool(keep)
    input, weight, bias = (tensor.to(device) for tensor in (torch.randn(9, 32), torch.randn(48, 32), torch.randn(48)))
    teacher = input @ weight.T + torch.randn(9, 48).to(device)
    tensors = {"input": input, "weight": weight, "bias": bias, "teacher": teacher}
    return {name: tensor.requires_grad_() for name, tensor in tensors.items()} | {"mask": mask.to(device)}


def in_sequence(
    input: Tensor,
    weight: Tensor,
    mask: Any,
    teacher: Tensor,
    bias: Tensor | None,
    gradient: Any = "masked",
    **options: Any,
) -> tuple[Tensor, Tensor]:
    output = masked_linear(input, weight, mask, bias, gradient=gradient)
    return cross_correlation_loss(output, teacher, **options), output


OPTIONS: list[dict[str, Any]] = [
    {},
    {"gradient": "dense", "center": False, "eps": 1e-5},
    {"target": "teacher", "off_diagonal_weight": 0.2, "form": "matrix"},
    {"sample_weight": torch.tensor([1.0, 0, 2, 1, 1, 0.5, 1, 3, 1])},
    {"sample_weight": torch.arange(9) != 4, "form": "gram"},
]


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("blocks", [True, False])
@pytest.mark.parametrize("backend", ["cpu", "triton", "reference"])
def test_equals_the_two_in_sequence(options: dict[str, Any], blocks: bool, backend: str, device: torch.device) -> None:
    device = torch.device("cpu") if backend == "cpu" else device
    inputs = problem(device, blocks=blocks)
    options = {name: value.to(device) if isinstance(value, Tensor) else value for name, value in options.items()}
    leaves = [value for value in inputs.values() if isinstance(value, Tensor)]
    with use_backend(backend):
        loss, output = masked_linear_cross_correlation_loss(**inputs, **options, return_output=True)
        alone = masked_linear_cross_correlation_loss(**inputs, **options)
        expected, expected_output = in_sequence(**inputs, **options)
    assert loss.dtype == torch.float32
    got = torch.autograd.grad(loss + output.square().sum(), leaves)
    wanted = torch.autograd.grad(expected + expected_output.square().sum(), leaves)
    pairs = [(loss, expected), (alone, expected), (output, expected_output), *zip(got, wanted, strict=True)]
    for result, want in pairs:
        if backend == "triton" and result.is_cuda:  # where the compiler orders the sums of each kernel as it likes
            torch.testing.assert_close(result, want, rtol=1e-4, atol=1e-5)
        else:
            assert torch.equal(result, want)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("blocks", [True, False])
@pytest.mark.parametrize("options", [{}, {"target": "teacher", "off_diagonal_weight": 0.2}, {"center": False}])
@pytest.mark.usefixtures("nan_filled_memory")
def test_sums_over_columns_in_the_product(
    options: dict[str, Any], blocks: bool, dtype: torch.dtype, device: torch.device, triton_backend: str
) -> None:
    """Several tiles of tokens, columns far from zero, one that is constant, and NaN in a row that does not count."""
    inputs = problem(device, blocks=blocks)
    shift = torch.linspace(-30, 30, 48, device=device)
    rows = torch.randn(150, 32, device=device)
    teacher = rows @ inputs["weight"].detach().T + torch.randn(150, 48, device=device) + shift
    teacher[:, 5] = 3.0
    rows[77], teacher[77] = 1e3, torch.nan
    tensors = {"input": rows, "weight": inputs["weight"], "bias": shift, "teacher": teacher}
    leaves = {name: value.detach().to(dtype).requires_grad_() for name, value in tensors.items()}
    weight = torch.rand(150, device=device)
    weight[77] = 0
    with use_backend(triton_backend):
        loss = masked_linear_cross_correlation_loss(**leaves, mask=inputs["mask"], sample_weight=weight, **options)
        expected, _ = in_sequence(**leaves, mask=inputs["mask"], sample_weight=weight, **options)
        leaves["input"].data[77] = torch.nan
        assert torch.equal(
            masked_linear_cross_correlation_loss(**leaves, mask=inputs["mask"], sample_weight=weight, **options), loss
        )
        leaves["input"].data[77] = 1e3
    torch.testing.assert_close(loss, expected, rtol=1e-4, atol=1e-5)
    tolerance = 1e-4 if dtype == torch.float32 else 1e-2
    names = ("input", "weight", "teacher")  # the bias gets what rounding leaves of 0 where columns are centred
    got = torch.autograd.grad(loss, [leaves[name] for name in names])
    wanted = torch.autograd.grad(expected, [leaves[name] for name in names])
    for result, want in zip(got, wanted, strict=True):
        assert result.isfinite().all()
        assert (result - want).abs().max() <= tolerance * want.abs().max()


def fused_arguments(device: torch.device) -> tuple[Any, ...]:
    inputs = problem(device)
    tensors = [inputs[name] for name in ("input", "weight", "bias", "teacher")]
    input, weight, bias, teacher = tensors
    options = (5e-3, True, False, 1e-12, "matrix", True, True)
    return (input, weight, inputs["mask"].words, bias, teacher, None, [], 0, 0, False, None, *options)


@pytest.mark.usefixtures("triton_backend")
def test_operator_is_registered_rightly(device: torch.device) -> None:
    arguments = fused_arguments(device)
    checks = ("test_schema", "test_autograd_registration", "test_faketensor")
    torch.library.opcheck(torch.ops.sdp_kernels.masked_linear_cross_correlation, arguments, test_utils=checks)


def test_only_what_is_asked_for_gets_a_gradient(device: torch.device, triton_backend: str) -> None:
    for asked in ("weight", "teacher", "bias"):
        inputs = {
            name: value.detach() if isinstance(value, Tensor) else value for name, value in problem(device).items()
        }
        inputs[asked].requires_grad_()
        with use_backend(triton_backend):
            loss = masked_linear_cross_correlation_loss(**inputs, form="matrix")
            expected, _ = in_sequence(**inputs, form="matrix")
        (got,) = torch.autograd.grad(loss, inputs[asked])
        torch.testing.assert_close(got, torch.autograd.grad(expected, inputs[asked])[0])


def test_without_gradients_and_without_bias(device: torch.device) -> None:
    inputs = problem(device)
    inputs["bias"] = None
    with torch.no_grad():
        loss = masked_linear_cross_correlation_loss(**inputs)
    assert not loss.requires_grad
    assert torch.equal(loss, in_sequence(**inputs)[0].detach())


def test_under_autocast(device: torch.device) -> None:
    inputs = problem(device)
    with torch.autocast(device.type, dtype=torch.bfloat16):
        loss, output = masked_linear_cross_correlation_loss(**inputs, return_output=True)
    assert (loss.dtype, output.dtype) == (torch.float32, torch.bfloat16)
    loss.backward()
    assert inputs["weight"].grad.dtype == torch.float32


# torch.compile itself makes an instance of every autograd.Function that it meets.
@pytest.mark.filterwarnings("default:.*should not be instantiated:DeprecationWarning")
def test_compiles_without_graph_breaks(device: torch.device) -> None:
    inputs = problem(device)
    mask = inputs.pop("mask")
    leaves = list(inputs.values())

    def call(*tensors: Tensor) -> Tensor:
        named = dict(zip(inputs, tensors, strict=True))
        return masked_linear_cross_correlation_loss(**named, mask=mask, gradient="dense")

    compiled = torch.compile(call, fullgraph=True, backend="aot_eager")
    expected = torch.autograd.grad(call(*leaves), leaves)
    for got, want in zip(torch.autograd.grad(compiled(*leaves), leaves), expected, strict=True):
        torch.testing.assert_close(got, want)


def test_passes_the_group_on(monkeypatch: pytest.MonkeyPatch, device: torch.device) -> None:
    """The rows of two ranks, here the same ones twice: what the group gathers is what the loss is made of."""
    from sdp_kernels.cross_correlation import gather

    group, groups = object(), []

    def twice(rows: Tensor, used: Any) -> Tensor:
        groups.append(used)
        return torch.cat((rows, rows))

    monkeypatch.setattr(gather, "gather_rows", twice)
    inputs = problem(device)
    loss = masked_linear_cross_correlation_loss(**inputs, process_group=group)
    output = masked_linear(inputs["input"], inputs["weight"], inputs["mask"], inputs["bias"])
    assert groups == [group, group]
    assert torch.equal(loss, cross_correlation_loss(torch.cat((output, output)), torch.cat((inputs["teacher"],) * 2)))


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"input": torch.ones(3, 3, 32)}, ValueError, r"input must have 2 dimensions, got shape \(3, 3, 32\)"),
        ({"input": torch.ones(9, 31)}, ValueError, r"weight must be \(out, in\) .* input \(9, 31\)"),
        ({"teacher": torch.ones(9, 32)}, ValueError, r"teacher must have shape \(9, 48\), got \(9, 32\)"),
        ({"teacher": torch.ones(9, 48).int()}, TypeError, "teacher must be a floating-point tensor, got torch.int32"),
        ({"weight": torch.ones(48)}, ValueError, r"weight must have 2 dimensions, got shape \(48,\)"),
        ({"mask": torch.ones(48, 32)}, TypeError, "mask must be a bool tensor or a BitMask"),
        ({"gradient": "none"}, ValueError, "gradient must be one of .* got 'none'"),
        ({"target": "none"}, ValueError, "target must be one of .* got 'none'"),
        ({"eps": -1.0}, ValueError, "eps must be at least 0, got -1.0"),
    ],
)
def test_bad_arguments(change: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        masked_linear_cross_correlation_loss(**(problem(torch.device("cpu")) | change))
