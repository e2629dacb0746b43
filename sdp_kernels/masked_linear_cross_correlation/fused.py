"""The operator on a GPU: the product takes the sums over its columns that the loss needs, while it has them at hand."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from sdp_kernels.cross_correlation import Options, loss_and_gradients
from sdp_kernels.dispatch import without_autocast
from sdp_kernels.masked_linear import Masking, Teacher, kernel_product, masked_linear_backward


@torch.library.custom_op("sdp_kernels::masked_linear_cross_correlation", mutates_args=())
def loss_and_output(
    input: Tensor,
    weight: Tensor,
    mask: Tensor,
    bias: Tensor | None,
    teacher: Tensor,
    sample_weight: Tensor | None,
    lists: Sequence[Tensor],
    block_rows: int,
    block_columns: int,
    dense_gradient: bool,
    dtype: torch.dtype | None,
    off_diagonal_weight: float,
    center: bool,
    residual: bool,
    eps: float,
    form: str,
    output_gradient: bool,
    teacher_gradient: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Loss and output, and the gradients of the loss by output and teacher, empty where not asked for."""
    dtype = dtype or input.dtype
    sample_weight = None if sample_weight is None else sample_weight.float().contiguous()
    options = Options(off_diagonal_weight, center, residual, eps, form, output_gradient, teacher_gradient)
    with without_autocast(input):
        target = Teacher(teacher.contiguous(), sample_weight, center)
        rows, bias = input.to(dtype), None if bias is None else bias.to(dtype)
        masking = Masking(mask, lists, (block_rows, block_columns), "triton")
        output, statistics = kernel_product(rows, weight, bias, masking, teacher=target)
        loss, *gradients = loss_and_gradients(output, target.features, sample_weight, options, "triton", statistics)
    return loss, output, gradients[0], gradients[1]


@loss_and_output.register_fake
def _(input: Tensor, weight: Tensor, mask: Tensor, bias: Tensor | None, teacher: Tensor, *others: Any) -> Any:
    dtype, output_gradient, teacher_gradient = others[5], *others[-2:]
    return (
        input.new_empty((), dtype=torch.float32),
        input.new_empty(teacher.shape, dtype=dtype),
        input.new_empty(teacher.shape if output_gradient else (0,), dtype=torch.float32),
        input.new_empty(teacher.shape if teacher_gradient else (0,), dtype=torch.float32),
    )


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    input, weight, mask, bias, teacher, _, lists, *ctx.sides, ctx.dense_gradient = inputs[:10]
    ctx.save_for_backward(input, weight, mask, *output[2:], *lists)
    ctx.dtypes = output[1].dtype, teacher.dtype, None if bias is None else bias.dtype
    ctx.set_materialize_grads(False)


def _backward(ctx: Any, scale: Tensor | None, gradient: Tensor | None, *_: Any) -> tuple[Any, ...]:
    """From the gradients of loss and output, either of which may be None."""
    input, weight, mask, of_output, of_teacher, *lists = ctx.saved_tensors
    need_input, need_weight, _, need_bias, need_teacher = ctx.needs_input_grad[:5]
    dtype, teacher_dtype, bias_dtype = ctx.dtypes
    results: list[Tensor | None] = [None] * 5
    if scale is not None and need_teacher:
        results[4] = (of_teacher * scale).to(teacher_dtype)
    if scale is not None and of_output.numel():
        share = (of_output * scale).to(dtype)
        gradient = share if gradient is None else share + gradient
    if gradient is not None and (need_input or need_weight or need_bias):
        of_input, of_weight, _ = masked_linear_backward(
            gradient=gradient,
            input=input,
            weight=weight,
            mask=mask,
            lists=lists,
            block_rows=ctx.sides[0],
            block_columns=ctx.sides[1],
            gate_rows=weight.shape[0],
            gate_columns=weight.shape[1],
            dense_gradient=ctx.dense_gradient,
            need_input=need_input,
            need_weight=need_weight,
            need_gate=False,
            backend="triton",
        )
        results[0] = of_input if need_input else None
        results[1] = of_weight if need_weight else None
        results[3] = gradient.sum(0).to(bias_dtype) if need_bias else None
    return (*results, None, [None] * len(lists), *[None] * 11)


loss_and_output.register_autograd(_backward, setup_context=_setup_context)
