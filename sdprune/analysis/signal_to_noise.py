"""Signal-to-noise: how much of the teacher's representation is left in the student's."""

import math

import torch
from torch import Tensor


def signal_to_noise(student: Tensor, teacher: Tensor) -> float:
    """Return 10 log10(|teacher|^2 / |teacher - student|^2) in decibels, over all rows together.

    A diagnostic of self-distilled pruning (our reconstruction), https://arxiv.org/abs/2109.15014.

    Args:
        student: any shape and float dtype; computed in float64.
        teacher: the same shape.

    Returns:
        Infinity where both are equal, minus infinity where the teacher is 0 and the student is not.

    Raises:
        ValueError: the shapes differ.
    """
    if student.shape != teacher.shape:
        raise ValueError(f"student must have the shape of teacher, {tuple(teacher.shape)}, got {tuple(student.shape)}")
    signal, difference = (
        float(torch.linalg.vector_norm(value))
        for value in (teacher.to(torch.float64), teacher.to(torch.float64) - student.to(torch.float64))
    )
    if difference == 0.0:
        return math.inf
    return 20.0 * math.log10(signal / difference) if signal > 0.0 else -math.inf
