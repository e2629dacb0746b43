"""Objectives: how far the student is from its teacher on a batch. Each returns one scalar, a mean.

    loss = task loss + distillation_weight * sum of weight * objective

The papers also write (1 - alpha) * task + alpha * objective; that is this loss with a distillation weight of
alpha / (1 - alpha), up to an overall factor to which Adam is blind.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal, cast

import torch
from torch import Tensor

from sdp_kernels import cosine_distance_loss, cross_correlation_loss, kl_divergence_loss
from sdprune.config import SDPruneConfig
from sdprune.distillation.teacher import Signals


def represent(signals: Signals, attention_mask: Tensor | None, kind: str) -> tuple[Tensor, Tensor | None]:
    """Return the rows (rows, dim) that are compared, and their weights (rows,) or None for all ones.

    Args:
        signals: of a student or a teacher.
        attention_mask: (batch, length), 0 = padding; None: no padding.
        kind: "first" unpadded token, "mean" over unpadded tokens, "pooled" output or all unpadded "tokens".

    Raises:
        ValueError: "pooled" with a model that has no pooler, or a mask of another length than the hidden state.
    """
    hidden = signals.hidden
    if attention_mask is not None and attention_mask.shape != hidden.shape[:2]:
        raise ValueError(
            f"representation={kind!r} needs one hidden state a token: the attention mask has shape "
            f"{tuple(attention_mask.shape)}, the last hidden state {tuple(hidden.shape)}"
        )
    if kind == "pooled":
        if signals.pooled is None:
            raise ValueError("representation='pooled', but the model has no pooler; choose first, mean or tokens")
        return signals.pooled, None
    if kind == "tokens":
        return hidden.flatten(0, 1), None if attention_mask is None else attention_mask.flatten()
    if attention_mask is None:
        return (hidden[:, 0] if kind == "first" else hidden.mean(1)), None
    if kind == "first":  # not position 0 where the padding stands on the left
        first = attention_mask.to(torch.int32).argmax(1)
        return hidden[torch.arange(len(hidden), device=hidden.device), first], None
    weight = attention_mask.to(hidden.dtype).unsqueeze(-1)
    return (hidden * weight).sum(1) / weight.sum(1).clamp(min=1), None


def cross_correlation(student: Signals, teacher: Signals, mask: Tensor | None, config: SDPruneConfig) -> Tensor:
    """SDP-CC: the cross-correlation loss of student and teacher features, divided by the number of features.

    The division is ours: it makes the weight independent of the width. Rows are the examples or tokens of one
    batch, so with gradient accumulation the loss sees one micro-batch at a time. A batch of a single row has no
    correlation and adds 0.
    """
    student_rows, weight = represent(student, mask, config.representation)
    teacher_rows, _ = represent(teacher, mask, config.representation)
    if (len(student_rows) if weight is None else int(weight.count_nonzero())) < 2:
        return student_rows.sum() * 0.0
    loss = cross_correlation_loss(
        student_rows,
        teacher_rows,
        off_diagonal_weight=config.off_diagonal_weight,
        target=cast(Literal["identity", "teacher"], config.correlation_target),
        sample_weight=weight,
    )
    return loss / student_rows.shape[1]


def kl(student: Signals, teacher: Signals, mask: Tensor | None, config: SDPruneConfig) -> Tensor:
    """SDP-KLD: temperature**2 * KL(teacher || student) of the softened class probabilities, mean over examples."""
    return kl_divergence_loss(student.logits, teacher.logits, temperature=config.temperature)


def cosine(student: Signals, teacher: Signals, mask: Tensor | None, config: SDPruneConfig) -> Tensor:
    """SDP-Cos: 1 - cosine of student and teacher features, mean over rows."""
    student_rows, weight = represent(student, mask, config.representation)
    teacher_rows, _ = represent(teacher, mask, config.representation)
    return cosine_distance_loss(student_rows, teacher_rows, sample_weight=weight)


Objective = Callable[[Signals, Signals, Tensor | None, SDPruneConfig], Tensor]
OBJECTIVES: dict[str, Objective] = {"cross_correlation": cross_correlation, "kl": kl, "cosine": cosine}


def distillation_terms(
    student: Signals, teacher: Signals, attention_mask: Tensor | None, config: SDPruneConfig
) -> dict[str, Tensor]:
    """Return every distillation term of `config` by name, unweighted."""
    return {name: OBJECTIVES[name](student, teacher, attention_mask, config) for name in config.distillation_weights}
