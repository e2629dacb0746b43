"""What every op of the registry promises, checked from its SPEC alone."""

from contextlib import nullcontext
from typing import Any

import pytest
import torch
from torch import Tensor

from sdp_kernels import BitMask, use_backend
from sdp_kernels.registry import SPECS
from sdp_kernels.spec import Inputs, OpSpec, Shape

NAMES = {torch.float32: "fp32", torch.float16: "fp16", torch.bfloat16: "bf16"}
INTERPRETER_DTYPES = (torch.float32, torch.float16)  # bfloat16 lies there
INTERPRETER_SHAPES = 4  # the first ones of a SPEC: an interpreted program takes milliseconds

Results = dict[str, Tensor]


def cases(*, kernels: bool = False, dtypes: tuple[torch.dtype, ...] | None = None) -> list[Any]:
    """One pytest parameter for each op, variant, shape and dtype."""
    parameters = []
    for spec in SPECS.values():
        if kernels and spec.kernel_module is None:
            continue
        for variant in spec.variants:
            for shape in spec.shapes[:INTERPRETER_SHAPES] if kernels else spec.shapes:
                for dtype in dtypes or spec.dtypes:
                    label = f"{spec.name}-{variant}-{'x'.join(map(str, shape))}-{NAMES[dtype]}"
                    parameters.append(pytest.param(spec, variant, shape, dtype, id=label.replace(" ", "_")))
    return parameters


LARGEST_CASES = [
    pytest.param(spec, variant, id=f"{spec.name}-{variant}".replace(" ", "_"))
    for spec in SPECS.values()
    for variant in spec.variants
]
LOSSES = [SPECS[name] for name in ("cross_correlation", "kl_divergence", "cosine_distance")]


def run(call: Any, spec: OpSpec, inputs: Inputs, options: Inputs, dtype: torch.dtype | None = None) -> Results:
    """Result and gradients of `call` on copies of the inputs, converted to `dtype` if one is given."""
    copies = {}
    for name, value in inputs.items():
        if dtype is not None and isinstance(value, Tensor) and value.is_floating_point():
            value = value.to(dtype)
        is_leaf = name in spec.grad_args
        copies[name] = value.detach().clone().requires_grad_() if is_leaf else value
    output = call(**copies, **options)
    if isinstance(output, BitMask):
        output = output.to_bool()
    results = {"result": output.detach()}
    if spec.grad_args:
        cotangent = torch.linspace(0.5, 1.5, output.numel(), device=output.device).view(output.shape)
        output.backward(cotangent.to(output.dtype))
        results |= {f"gradient of {name}": copies[name].grad for name in spec.grad_args}
    return results


def assert_right(spec: OpSpec, inputs: Inputs, options: Inputs, dtype: torch.dtype, got: Results) -> None:
    """Each result errs at most twice as much as eager torch does in this dtype, plus a floor."""
    truth = run(spec.reference, spec, inputs, options, torch.float64)
    eager = run(spec.reference, spec, inputs, options)
    for name, expected in truth.items():
        assert got[name].shape == expected.shape, name
        assert got[name].isfinite().all(), f"{name} is not finite"
        error = (got[name].double() - expected.double()).abs().max()
        lost = (eager[name].double() - expected.double()).abs().max()
        allowed = 2 * lost + spec.floors[dtype] * expected.double().abs().max()
        assert error <= allowed, f"{name}: error {error:.3g}, allowed {allowed:.3g}"


@pytest.mark.parametrize(("spec", "variant", "shape", "dtype"), cases())
@pytest.mark.usefixtures("nan_filled_memory")
def test_values_and_gradients(
    spec: OpSpec, variant: str, shape: Shape, dtype: torch.dtype, device: torch.device
) -> None:
    inputs, options = spec.inputs(shape, dtype, device), spec.variants[variant]
    got = run(spec.op, spec, inputs, options)
    assert_right(spec, inputs, options, dtype, got)
    for name in spec.grad_args:
        assert got[f"gradient of {name}"].dtype == dtype


@pytest.mark.parametrize(("spec", "variant", "shape", "dtype"), cases(kernels=True, dtypes=INTERPRETER_DTYPES))
@pytest.mark.usefixtures("nan_filled_memory")
def test_kernels(
    spec: OpSpec,
    variant: str,
    shape: Shape,
    dtype: torch.dtype,
    device: torch.device,
    triton_backend: str,
) -> None:
    inputs, options = spec.inputs(shape, dtype, device), spec.variants[variant]
    with use_backend(triton_backend):
        got = run(spec.op, spec, inputs, options)
    assert_right(spec, inputs, options, dtype, got)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize(("spec", "variant", "shape", "dtype"), cases(kernels=True, dtypes=(torch.bfloat16,)))
def test_kernels_in_bfloat16(
    spec: OpSpec, variant: str, shape: Shape, dtype: torch.dtype, device: torch.device, triton_backend: str
) -> None:
    inputs, options = spec.inputs(shape, dtype, device), spec.variants[variant]
    with use_backend(triton_backend):
        got = run(spec.op, spec, inputs, options)
    assert_right(spec, inputs, options, dtype, got)


@pytest.mark.parametrize(("spec", "variant"), LARGEST_CASES)
@pytest.mark.parametrize("backend", ["default", "reference"])
def test_strided_inputs_give_the_same_and_stay_unchanged(
    spec: OpSpec, variant: str, backend: str, device: torch.device
) -> None:
    inputs, options = spec.inputs(spec.shapes[-1], torch.float32, device), spec.variants[variant]
    strided = {
        name: torch.stack((value, value), -1)[..., 0] if isinstance(value, Tensor) else value
        for name, value in inputs.items()
    }
    before = {name: value.clone() for name, value in strided.items() if isinstance(value, Tensor)}
    with nullcontext() if backend == "default" else use_backend(backend):
        dense = run(spec.op, spec, inputs, options)
        got = run(spec.op, spec, strided, options)
    for name, expected in dense.items():
        torch.testing.assert_close(got[name], expected, rtol=1e-5, atol=1e-6, msg=name)
    for name, value in before.items():
        assert torch.equal(strided[name], value), f"{name} was modified"


@pytest.mark.parametrize(("spec", "variant"), LARGEST_CASES)
def test_deterministic(spec: OpSpec, variant: str, device: torch.device) -> None:
    inputs, options = spec.inputs(spec.shapes[-1], torch.float32, device), spec.variants[variant]
    first, second = (run(spec.op, spec, inputs, options) for _ in range(2))
    for name, expected in first.items():
        assert torch.equal(second[name], expected), name


@pytest.mark.parametrize("spec", LOSSES, ids=lambda spec: spec.name)
def test_losses_are_not_lowered_by_autocast(spec: OpSpec, device: torch.device) -> None:
    inputs = spec.inputs(spec.shapes[-1], torch.float32, device)
    options = next(iter(spec.variants.values()))
    plain = run(spec.op, spec, inputs, options)
    with torch.autocast(device.type, dtype=torch.bfloat16):
        got = run(spec.op, spec, inputs, options)
    for name, expected in plain.items():
        assert torch.equal(got[name], expected), name


@pytest.mark.parametrize("spec", [spec for spec in SPECS.values() if spec.grad_args], ids=lambda spec: spec.name)
def test_gradcheck(spec: OpSpec, device: torch.device) -> None:
    inputs = spec.inputs(spec.shapes[1], torch.float64, device)
    others = {name: value for name, value in inputs.items() if name not in spec.grad_args}
    leaves = [inputs[name].requires_grad_() for name in spec.grad_args]
    for options in spec.variants.values():
        if options.get("gradient") == "dense":
            continue  # straight-through: deliberately not the derivative

        def call(*values: Tensor, options: Inputs = options) -> Any:
            named = dict(zip(spec.grad_args, values, strict=True))
            return spec.op(**named, **others, **options)

        assert torch.autograd.gradcheck(call, leaves)


@pytest.mark.parametrize("spec", SPECS.values(), ids=lambda spec: spec.name)
def test_costs_are_counted(spec: OpSpec) -> None:
    for shape in spec.bench_shapes:
        assert spec.flops(shape) > 0
        assert spec.bytes(shape, 2) > 0
