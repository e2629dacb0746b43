"""Both losses on a CPU, a few rows at a time, so that what is computed on the way stays in the cache.

Forward gives a loss a row and the few numbers a row (`statistics`) from which backward makes its gradient again.
"""

from collections.abc import Iterator

import torch
from torch import Tensor

from sdp_kernels.checks import compute_dtype
from sdp_kernels.distillation.reference import leave_out
from sdp_kernels.distillation.rows import RowLosses, room_for

CHUNK_ELEMENTS = 2**19


def row_losses(
    student: Tensor, teacher: Tensor, sample_weight: Tensor | None, kind: str, option: float
) -> tuple[Tensor, Tensor]:
    """The loss of each row, 0 for rows left out, and its statistics, (rows, numbers); both in the compute dtype."""
    forward = FORWARD[kind]
    results = [forward(s, t, option) for _, s, t in _chunks(student, teacher, sample_weight)]
    losses, statistics = (torch.cat(parts) for parts in zip(*results, strict=True))
    if sample_weight is not None:
        losses.masked_fill_(sample_weight.flatten() <= 0, 0)
    return losses.view(student.shape[:-1]), statistics


def row_gradients(
    scale: Tensor, found: RowLosses, kind: str, option: float, student_gradient: bool, teacher_gradient: bool
) -> tuple[Tensor, Tensor]:
    """The gradients asked for (the others empty) in the dtypes of their inputs; `scale` is that of each row's loss."""
    student, teacher, sample_weight, losses, statistics = found
    backward, columns = BACKWARD[kind], student.shape[-1]
    results = room_for(student, teacher, student_gradient, teacher_gradient)
    numbers = torch.cat((scale.reshape(-1, 1), losses.reshape(-1, 1), statistics), 1)
    for rows, s, t in _chunks(student, teacher, sample_weight):
        gradients = backward(s, t, numbers[rows, :, None].unbind(1), option, student_gradient, teacher_gradient)
        for result, gradient in zip(results, gradients, strict=True):
            if gradient is not None:
                result.view(-1, columns)[rows] = gradient
    return results


def _chunks(student: Tensor, teacher: Tensor, sample_weight: Tensor | None) -> Iterator[tuple[slice, Tensor, Tensor]]:
    """Some rows at a time: which, and both inputs there as matrices in the compute dtype, zeros where left out."""
    dtype, columns = compute_dtype(student, teacher), student.shape[-1]
    height = max(1, CHUNK_ELEMENTS // columns)
    student, teacher = student.reshape(-1, columns), teacher.reshape(-1, columns)
    for start in range(0, student.shape[0], height):
        rows = slice(start, start + height)
        weight = None if sample_weight is None else sample_weight.reshape(-1)[rows]
        yield rows, leave_out(student[rows].to(dtype), weight), leave_out(teacher[rows].to(dtype), weight)


def _kl_losses(s: Tensor, t: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    """The statistics are maximum and sum of exponentials of the student's logits, then of the teacher's."""
    s_top, t_top = s.amax(1), t.amax(1)
    s = (s - s_top[:, None]).div_(temperature)
    t = (t - t_top[:, None]).div_(temperature)
    excess = t - s  # of the teacher's logits over the student's, both from their maxima
    p = t.exp_()
    s_sum, t_sum = s.exp_().sum(1), p.sum(1)
    excess = excess.mul_(p).masked_fill_(p == 0, 0).sum(1)
    return excess / t_sum + (s_sum / t_sum).log(), torch.stack((s_top, s_sum, t_top, t_sum), 1)


def _kl_gradients(
    s: Tensor,
    t: Tensor,
    numbers: tuple[Tensor, ...],
    temperature: float,
    student_gradient: bool,
    teacher_gradient: bool,
) -> tuple[Tensor | None, Tensor | None]:
    scale, divergence, s_top, s_sum, t_top, t_sum = numbers
    scale = scale / temperature
    s = (s - s_top).div_(temperature)
    t = (t - t_top).div_(temperature)
    excess = t - s if teacher_gradient else None
    p = t.exp_().mul_(scale / t_sum)
    student_result = s.exp_().mul_(scale / s_sum).sub_(p) if student_gradient else None
    if excess is not None:
        excess.sub_(divergence - (s_sum / t_sum).log()).mul_(p).masked_fill_(p == 0, 0)
    return student_result, excess


def _cosine_losses(s: Tensor, t: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """The statistics are the norms of student and teacher."""
    norms = torch.stack((torch.linalg.vector_norm(s, dim=1), torch.linalg.vector_norm(t, dim=1)), 1)
    # One division: a single column has cosine 1 or -1 to the last bit. The second bound is for rows of zeros.
    bound = norms.clamp_min(eps).prod(1).clamp_min_(torch.finfo(norms.dtype).tiny)
    return 1 - (s * t).sum(1) / bound, norms


def _cosine_gradients(
    s: Tensor, t: Tensor, numbers: tuple[Tensor, ...], eps: float, student_gradient: bool, teacher_gradient: bool
) -> tuple[Tensor | None, Tensor | None]:
    scale, distance, s_norm, t_norm = numbers
    cosine = 1 - distance
    s_bound, t_bound = s_norm.clamp_min(eps), t_norm.clamp_min(eps)
    s_unit = s / s_norm.masked_fill(s_norm == 0, 1)
    t_unit = t / t_norm.masked_fill(t_norm == 0, 1)
    # torch bounds the norms without a gradient of the bound: that of the norm itself, x / |x|, passes through.
    return (
        (cosine * s_unit).addcmul_(t_unit, t_norm / t_bound, value=-1).mul_(scale / s_bound)
        if student_gradient
        else None,
        (cosine * t_unit).addcmul_(s_unit, s_norm / s_bound, value=-1).mul_(scale / t_bound)
        if teacher_gradient
        else None,
    )


FORWARD = {"kl": _kl_losses, "cosine": _cosine_losses}
BACKWARD = {"kl": _kl_gradients, "cosine": _cosine_gradients}
