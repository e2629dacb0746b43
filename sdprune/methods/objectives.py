"""Objectives: how far the student is from its teacher on a batch. Each returns one scalar, a mean.

    loss = task_weight * task loss + distillation_weight * sum of weight * objective

The papers also write (1 - alpha) * task + alpha * objective: task_weight 1 - alpha and distillation_weight alpha.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, cast

import torch
from torch import Tensor, distributed

from sdp_kernels import (
    BitMask,
    RowQueue,
    aligned_weight_loss,
    cosine_distance_loss,
    cross_correlation_loss,
    kl_divergence_loss,
)
from sdprune.methods.table import Options, Table, check

COMPARES = ("rows", "logits", "weights")


@dataclass(frozen=True)
class Comparison:
    """What an objective of "rows" or "logits" compares: one feature of a batch.

    Args:
        options: the configuration.
        student: (rows, dim), with gradients; logits have a row for each prediction.
        teacher: (rows, dim).
        mask: (rows) bool, the rows that count; None: all.
        queue: for rows of earlier batches, filled by use; None where `queue_size` asks for none.
        group: the processes whose rows belong together; None: this one's alone.
    """

    options: Options
    student: Tensor
    teacher: Tensor
    mask: Tensor | None = None
    queue: RowQueue | None = None
    group: distributed.ProcessGroup | None = None


@dataclass(frozen=True)
class WeightComparison:
    """What an objective of "weights" compares: those of all masked layers, (out, in) each, and the student's masks."""

    options: Options
    student: tuple[Tensor, ...]
    teacher: tuple[Tensor, ...]
    masks: tuple[BitMask, ...]


def cross_correlation(comparison: Comparison) -> Tensor:
    """SDP-CC: the cross-correlation loss of student and teacher features, divided by the number of features.

    The division is ours: it makes the weight independent of the width. Rows are the examples or tokens of one
    batch, those of all processes together, so with gradient accumulation the loss sees one micro-batch at a time; a
    queue adds the rows of earlier ones, without gradients. A single row has no correlation and adds 0.
    """
    student, teacher, mask = comparison.student, comparison.teacher, comparison.mask
    options, queue, group = comparison.options, comparison.queue, comparison.group
    if mask is not None and (queue is not None or group is not None):
        # a queue takes the rows that count, and processes exchange no others; selecting them waits for a GPU
        student, teacher, mask = student[mask], teacher[mask], None
    if queue is not None:
        student, teacher = queue.extend(student, teacher)
    # Looking into the mask would stall a GPU in every step: there the factor below says whether two rows count.
    looked_into = mask is not None and mask.device.type == "cpu"
    count = int(mask.count_nonzero()) if mask is not None and looked_into else len(student)
    if _total(count, group, student.device) < 2:
        return student[:0].sum()
    loss = cross_correlation_loss(
        student,
        teacher,
        off_diagonal_weight=options.off_diagonal_weight,
        center=options.center,
        target=cast(Literal["identity", "teacher"], options.correlation_target),
        sample_weight=mask,
        process_group=group,
    )
    if mask is not None and not looked_into:
        loss = loss * (mask.count_nonzero() > 1)
    return loss / student.shape[1]


def _total(count: int, group: distributed.ProcessGroup | None, device: torch.device) -> int:
    """The sum over the processes, the same on each: all of them take part in the loss, or none."""
    if group is None:
        return count
    counts = torch.tensor(count, device=device)
    distributed.all_reduce(counts, group=group)
    return int(counts)


def kl(comparison: Comparison) -> Tensor:
    """SDP-KLD: temperature**2 * KL(teacher || student) of the softened class probabilities, mean over predictions.

    One prediction is an example, or a position of a model that predicts at every one, without padding and ignored
    labels. Where none counts it is 0.
    """
    if _none_counts(comparison.mask):
        return comparison.student[:0].sum()
    return kl_divergence_loss(
        comparison.student,
        comparison.teacher,
        temperature=comparison.options.temperature,
        sample_weight=comparison.mask,
    )


def cosine(comparison: Comparison) -> Tensor:
    """SDP-Cos: 1 - cosine of student and teacher features, mean over rows; 0 where none counts."""
    if _none_counts(comparison.mask):
        return comparison.student[:0].sum()
    return cosine_distance_loss(comparison.student, comparison.teacher, sample_weight=comparison.mask)


def _none_counts(mask: Tensor | None) -> bool:
    """Tell whether a CPU's mask leaves all rows out, which the losses refuse there; on a GPU they are 0 unasked."""
    return mask is not None and mask.device.type == "cpu" and not bool(mask.any())


def mse(comparison: Comparison) -> Tensor:
    """Mean over rows and features of the squared difference of student and teacher, in at least fp32."""
    student, teacher, mask = comparison.student, comparison.teacher, comparison.mask
    dtype = torch.promote_types(torch.promote_types(student.dtype, teacher.dtype), torch.float32)
    difference = student.to(dtype) - teacher.to(dtype)
    if mask is None:
        return difference.square().mean()
    difference = difference.masked_fill(~mask.unsqueeze(-1), 0.0)  # before the square: padding may hold NaN
    return difference.square().sum() / (mask.count_nonzero().clamp(min=1) * student.shape[1])


def aligned_cosine(comparison: WeightComparison) -> Tensor:
    """AWR: 1 - cosine of the rows of every masked weight and the teacher's weight of that name."""
    return _aligned(comparison, "cosine")


def aligned_frobenius(comparison: WeightComparison) -> Tensor:
    """AWR: squared distance of every masked weight from the teacher's, over the squared norm of the teacher's."""
    return _aligned(comparison, "frobenius")


def _aligned(comparison: WeightComparison, kind: Literal["cosine", "frobenius"]) -> Tensor:
    return aligned_weight_loss(comparison.student, comparison.teacher, kind=kind, masks=comparison.masks)


@dataclass(frozen=True)
class Objective:
    """How far the student is from its teacher.

    Args:
        loss: `Comparison` (of "weights" `WeightComparison`) -> scalar, a mean; where several hidden layers are compared
            their mean is taken.
        compares: "rows" (of the features that a term names), "logits" or "weights" (of the masked layers).
        label: what the literature calls it; "": its name in the table.
        distribution: whether logits are taken for those of one distribution over the classes.

    Raises:
        ValueError: a field with a value that is not allowed.
    """

    loss: Callable[[Any], Tensor]
    compares: str = "rows"
    label: str = ""
    distribution: bool = False

    def __post_init__(self) -> None:
        check(self, "loss", callable(self.loss), "a function of a comparison")
        check(self, "compares", self.compares in COMPARES, f"one of {', '.join(map(repr, COMPARES))}")
        check(self, "label", isinstance(self.label, str), "a text")
        allowed = (True, False) if self.compares == "logits" else (False,)
        check(self, "distribution", self.distribution in allowed, "False, or True with compares='logits'")


OBJECTIVES = Table(
    "OBJECTIVES",
    Objective,
    {
        "cross_correlation": Objective(cross_correlation, label="SDP-CC"),
        "kl": Objective(kl, compares="logits", label="SDP-KLD", distribution=True),
        "cosine": Objective(cosine, label="SDP-Cos"),
        "mse": Objective(mse, label="MSE"),
        "aligned_cosine": Objective(aligned_cosine, compares="weights", label="AWR cosine"),
        "aligned_frobenius": Objective(aligned_frobenius, compares="weights", label="AWR Frobenius"),
    },
    reserved=("task", "none", "null"),  # the task loss of the log; no distillation on the command line
)
