"""Measures of a pruned model: how far its classes are apart, what is left of the teacher, how soon scores return."""

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


def class_separability(features: Tensor, labels: Tensor) -> float:
    """Return trace(S_between) / trace(S_within), a diagnostic of self-distilled pruning (our reconstruction).

    S_between is the scatter of the class means around the mean of all rows, each class weighted by its count;
    S_within that of the rows around the mean of their class. https://arxiv.org/abs/2109.15014

    Args:
        features: (rows, dim), any float dtype; computed in float64.
        labels: (rows,), the class of every row.

    Returns:
        0 where the class means coincide, infinity where every class is a single point apart from the others, NaN
        where all rows are the same point.

    Raises:
        ValueError: the shapes do not fit, or there are fewer than two classes.
    """
    if features.dim() != 2 or labels.shape != features.shape[:1]:
        raise ValueError(
            "features must be (rows, dim) and labels (rows,), got shapes "
            f"{tuple(features.shape)} and {tuple(labels.shape)}"
        )
    classes, index = torch.unique(labels, return_inverse=True)
    if len(classes) < 2:
        raise ValueError(f"labels must hold at least two classes, got {classes.tolist()}")
    rows = features.to(torch.float64)
    counts = index.bincount(minlength=len(classes)).to(rows.dtype)
    means = rows.new_zeros(len(classes), rows.shape[1]).index_add_(0, index, rows) / counts.unsqueeze(1)
    within = (rows - means[index]).square().sum()
    between = (counts.unsqueeze(1) * (means - rows.mean(0)).square()).sum()
    return float(between / within)


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


@dataclass(frozen=True)
class Recovery:
    """What followed one pruning step.

    Args:
        moment: optimizer steps that were finished when it happened.
        before: the last score before it.
        steps: optimizer steps until a score was at least the wanted fraction of `before`; None: not before the next
            pruning step, or the end.
        area: mean of the scores from then to the next pruning step or the end, by the trapezoidal rule over the
            steps; None with fewer than two scores.
    """

    moment: int
    before: float
    steps: int | None
    area: float | None


def recoveries(
    scores: Sequence[tuple[int, float]], moments: Sequence[int], *, fraction: float = 0.99
) -> list[Recovery]:
    """Return what followed every pruning step that was preceded by a score.

    The convergence diagnostic of self-distilled pruning (our reconstruction), https://arxiv.org/abs/2109.15014. It
    knows no more than the scores that were measured: recovery counts from the pruning step to the first of them that
    is high enough.

    Args:
        scores: (finished optimizer steps, score) in order; higher is better, scores are positive.
        moments: finished optimizer steps before every pruning step, in order.
        fraction: of the score before a pruning step that counts as recovered.
    """
    found = []
    for moment, following in zip(moments, [*moments, float("inf")][1:], strict=True):
        earlier = [score for step, score in scores if step <= moment]
        if not earlier:
            continue
        window = [(step, score) for step, score in scores if moment < step <= following]
        back = [step - moment for step, score in window if score >= fraction * earlier[-1]]
        found.append(Recovery(moment, earlier[-1], back[0] if back else None, _mean_height(window)))
    return found


def _mean_height(points: Sequence[tuple[int, float]]) -> float | None:
    if len(points) < 2:
        return None
    area = sum((right[0] - left[0]) * (left[1] + right[1]) / 2 for left, right in itertools.pairwise(points))
    return area / (points[-1][0] - points[0][0])
