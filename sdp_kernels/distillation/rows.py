"""What the losses of rows keep for their gradients, in the same form for every backend."""

from typing import NamedTuple

from torch import Tensor

STATISTICS = {"kl": 4, "cosine": 2}  # numbers a row from which backward makes the gradient again


class RowLosses(NamedTuple):
    """What went into the losses of rows, and what came out."""

    student: Tensor  # (..., columns)
    teacher: Tensor
    sample_weight: Tensor | None  # (...)
    losses: Tensor  # (...)
    statistics: Tensor  # (rows, numbers)


def room_for(student: Tensor, teacher: Tensor, student_gradient: bool, teacher_gradient: bool) -> tuple[Tensor, Tensor]:
    """Memory for the gradients asked for, in the dtypes of their inputs; empty tensors for the others."""
    return (
        student.new_empty(student.shape if student_gradient else (0,)),
        teacher.new_empty(teacher.shape if teacher_gradient else (0,)),
    )
