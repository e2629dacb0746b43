"""The cross-correlation loss of self-distilled pruning: public function, checks, autograd, registration.

There are two ways to it (forms.py), and the sizes choose. For small batches the Gram form is cheaper: it never makes
the dim x dim matrix C. But it subtracts the diagonal from the sum of all squares, and with more than dim / 2 rows the
diagonal may be nearly the whole sum. There C itself is made, some rows at a time, and its diagonal zeroed.

The large products are left to cuBLAS and oneDNN, and the kernels do what surrounds them; only few rows, where launches
cost more than arithmetic, have kernels for the whole job. Gradients are made in the forward pass, from the columns and
products at hand there, so backward is one multiplication.
"""

from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor

from sdp_kernels.checks import (
    check_dims,
    check_pair,
    check_sample_weight,
    check_weight_values,
    compute_dtype,
)
from sdp_kernels.cross_correlation.forms import Options, checked_options, decided_options
from sdp_kernels.cross_correlation.reference import cross_correlation_loss_reference
from sdp_kernels.dispatch import OFFERS, PLAIN, choose_backend, without_autocast

if TYPE_CHECKING:
    import torch.distributed as dist


def cross_correlation_loss(
    student: Tensor,
    teacher: Tensor,
    *,
    off_diagonal_weight: float = 5e-3,
    center: bool = True,
    target: Literal["identity", "teacher"] = "identity",
    eps: float = 1e-12,
    sample_weight: Tensor | None = None,
    process_group: "dist.ProcessGroup | None" = None,
    form: Literal["auto", "gram", "matrix"] = "auto",
) -> Tensor:
    """Drive the cross-correlation of student and teacher features to the identity, or to the teacher's own.

    C_ij is the correlation, over the batch, of feature i of the student with feature j of the teacher. The
    loss is the sum of (C_ii - 1)^2 plus `off_diagonal_weight` times the sum of C_ij^2 over i != j; with
    `target="teacher"` it is the same weighted sum of squares of C minus the teacher's own correlation.

    The identity target is that of self-distilled pruning (https://arxiv.org/abs/2109.15014), after Barlow
    Twins (https://arxiv.org/abs/2103.03230): with `eps=1e-5` the value is that of the published code. The
    teacher target is zero only where both agree up to a positive factor (and a shift) for each feature.

    Args:
        student: (batch, dim), any float dtype.
        teacher: (batch, dim), any float dtype; may differ from the student's. Gets a gradient if it asks.
        off_diagonal_weight: weight of the terms off the diagonal, >= 0. Their sum grows like
            dim^2 / batch, so set it together with the batch size.
        center: subtract each feature's mean over the batch first.
        target: "identity" or "teacher".
        eps: added to each feature's mean square.
        sample_weight: (batch,), weights >= 0 of the rows in means, norms and correlations, a bool mask, or
            None for equal ones. Rows without a positive weight are left out entirely: they may hold NaN. Too few
            rows that count are an error on a CPU; on a GPU, where looking would stall it, they correlate with nothing.
        process_group: compute the loss over the rows of all ranks. Every rank returns the global value, and
            the gradients of its inputs are world-size times the global ones, so that the averaging of DDP
            and FSDP gives the single-process gradient of the parameters. None means local rows only.
        form: "gram" works with batch x batch products, "matrix" with C itself; "auto" takes the one that
            is cheaper and safe. The Gram form loses digits when batch > dim / 2.

    Returns:
        A scalar, float32 (float64 if an input is), also under autocast. A feature that is constant over the
        batch counts as dead if it is centred, one of zeros always: its correlations are 0 and it receives no
        gradient. NaN or infinity in a row that counts makes the loss NaN.

    Raises:
        ValueError: shapes or devices differ, fewer than 2 rows to centre, a number out of its range, weights that
            are negative or leave fewer rows than that.
        TypeError: an input is not a floating-point tensor.
        RuntimeError: on double backward; gradients are made in the forward pass.

    Example:
        >>> teacher = torch.tensor([[1.0, 1.0], [1.0, -1.0], [-1.0, 1.0], [-1.0, -1.0]])
        >>> student = teacher.flip(1).requires_grad_()  # each feature is where the other should be
        >>> loss = cross_correlation_loss(student, teacher, off_diagonal_weight=0.5)
        >>> round(loss.item(), 4)
        3.0
    """
    _check_tensors(student, teacher, sample_weight)
    options = checked_options(off_diagonal_weight=off_diagonal_weight, center=center, target=target, eps=eps, form=form)
    if process_group is not None:
        from sdp_kernels.cross_correlation.gather import gather_rows

        student, teacher = gather_rows(student, process_group), gather_rows(teacher, process_group)
        if sample_weight is not None:
            sample_weight = gather_rows(sample_weight, process_group)
    batch, dim = student.shape
    if batch < 1 + center or dim < 1:
        raise ValueError(f"student must have at least {1 + center} rows and 1 column, got shape {(batch, dim)}")
    check_weight_values(sample_weight, rows=1 + center)

    backend = choose_backend("cross_correlation_loss", (student, teacher), OFFERS)
    if backend == "reference":
        with without_autocast(student):
            return cross_correlation_loss_reference(
                student,
                teacher,
                off_diagonal_weight=off_diagonal_weight,
                center=center,
                target=target,
                eps=eps,
                sample_weight=sample_weight,
            )
    grad = torch.is_grad_enabled()
    wanted = {"student_gradient": grad and student.requires_grad, "teacher_gradient": grad and teacher.requires_grad}
    options = decided_options(options, batch, dim, **wanted)
    loss: Tensor = _CrossCorrelation.apply(student, teacher, sample_weight, options, backend)  # type: ignore[no-untyped-call]
    return loss


def _check_tensors(student: Tensor, teacher: Tensor, sample_weight: Tensor | None) -> None:
    check_pair(student, teacher, "student", "teacher")
    check_dims("student", student, 2)
    check_sample_weight(sample_weight, student.shape[:1], student)


def loss_and_gradients(
    student: Tensor,
    teacher: Tensor,
    sample_weight: Tensor | None,
    options: Options,
    backend: str,
    statistics: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Loss and the gradients asked for (the others empty), all in the compute dtype.

    Args:
        student: (batch, dim).
        teacher: (batch, dim).
        sample_weight: (batch,) or None.
        options: what to compute.
        backend: "triton" or "cpu".
        statistics: sums over the columns that somebody has taken already, as `kernel.loss_and_gradients` describes
            them; only for "triton".
    """
    with without_autocast(student):
        if backend == "cpu":
            from sdp_kernels.cross_correlation import cpu

            return cpu.loss_and_gradients(student, teacher, sample_weight, options)
        from sdp_kernels.cross_correlation import kernel

        return kernel.loss_and_gradients(student, teacher, sample_weight, options, statistics)


@torch.library.custom_op("sdp_kernels::cross_correlation", mutates_args=())
def _cross_correlation(
    student: Tensor,
    teacher: Tensor,
    sample_weight: Tensor | None,
    weight: float,
    center: bool,
    residual: bool,
    eps: float,
    form: str,
    backend: str,
    student_gradient: bool,
    teacher_gradient: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    options = Options(weight, center, residual, eps, form, student_gradient, teacher_gradient)
    return loss_and_gradients(student, teacher, sample_weight, options, backend)


@_cross_correlation.register_fake
def _(student: Tensor, teacher: Tensor, *others: Any) -> tuple[Tensor, Tensor, Tensor]:
    dtype, (student_gradient, teacher_gradient) = compute_dtype(student, teacher), others[-2:]
    return (
        student.new_empty((), dtype=dtype),
        student.new_empty(student.shape if student_gradient else (0,), dtype=dtype),
        teacher.new_empty(teacher.shape if teacher_gradient else (0,), dtype=dtype),
    )


class _CrossCorrelation(torch.autograd.Function):
    """The loss with the gradients that the operator made in the forward pass.

    This is not `register_autograd`, whose bookkeeping for so many arguments costs as much as the smallest losses.
    """

    @staticmethod
    def forward(
        ctx: Any, student: Tensor, teacher: Tensor, sample_weight: Tensor | None, options: Options, backend: str
    ) -> Tensor:
        watched = torch.compiler.is_compiling() or student.is_meta
        if not watched and type(student) in PLAIN and type(teacher) in PLAIN:
            # The operator's way to the function takes longer than the function on the smallest input.
            loss, *gradients = loss_and_gradients(student, teacher, sample_weight, options, backend)
        else:
            loss, *gradients = _cross_correlation(
                student=student,
                teacher=teacher,
                sample_weight=sample_weight,
                weight=options.weight,
                center=options.center,
                residual=options.residual,
                eps=options.eps,
                form=options.form,
                backend=backend,
                student_gradient=options.student_gradient,
                teacher_gradient=options.teacher_gradient,
            )
        ctx.save_for_backward(*gradients)
        ctx.dtypes = student.dtype, teacher.dtype
        return loss

    @staticmethod
    def backward(ctx: Any, scale: Tensor) -> tuple[Tensor | None, ...]:
        if torch.is_grad_enabled() and not torch.compiler.is_compiling():
            raise RuntimeError("cross_correlation_loss does not support double backward (create_graph=True)")
        gradients = [
            torch.mul(gradient, scale, out=gradient.new_empty(gradient.shape, dtype=dtype)) if needed else None
            for gradient, dtype, needed in zip(ctx.saved_tensors, ctx.dtypes, ctx.needs_input_grad, strict=False)
        ]
        return (*gradients, None, None, None)
