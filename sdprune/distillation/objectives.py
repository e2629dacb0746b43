"""Objectives: how far the student is from its teacher on a batch. Each returns one scalar, a mean.

    loss = task_weight * task loss + distillation_weight * sum of weight * objective

The papers also write (1 - alpha) * task + alpha * objective: task_weight 1 - alpha and distillation_weight alpha.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Literal, cast

import torch
from torch import Tensor, distributed, nn

from sdp_kernels import (
    aligned_weight_loss,
    cosine_distance_loss,
    cross_correlation_loss,
    kl_divergence_loss,
)
from sdprune.config import OBJECTIVES as COMPARED
from sdprune.config import SDPruneConfig, split_term
from sdprune.distillation.features import Features, row_names
from sdprune.distillation.queue import SavedRowQueue
from sdprune.masking.linears import matrix
from sdprune.masking.swap import masked_layers


@dataclass(frozen=True)
class Comparison:
    """What one batch gives to compare.

    Args:
        config: the options of the objectives.
        student: features of the student, with gradients.
        teacher: features of the teacher under the same names.
        tokens: (batch, length) bool, the positions that count in hidden states; None: all.
        positions: (batch, length) bool, the positions that count in logits; None: all.
        models: student and teacher, whose weights some objectives compare.
        queues: rows of earlier batches of every term and feature, if `config.queue_size` asks for them; filled by use.
        group: the processes over whose rows "cross_correlation" is taken together; None: this one's rows alone.
        term: the key of `config.distillation` that is computed; it may name the feature to compare.
    """

    config: SDPruneConfig
    student: Features
    teacher: Features
    tokens: Tensor | None
    positions: Tensor | None
    models: tuple[nn.Module, nn.Module]
    queues: dict[str, SavedRowQueue]
    group: distributed.ProcessGroup | None = None
    term: str = ""

    def rows(self) -> Iterator[tuple[str, Tensor, Tensor, Tensor | None]]:
        """Yield for every compared feature its name, rows (rows, dim) of student and teacher, and which rows count."""
        for name in row_names(self.config, self.term):
            student, teacher = self.student[name], self.teacher[name]
            if student.dim() == 2:
                yield name, student, teacher, None
                continue
            mask = self.positions if name == "logits" else self.tokens
            yield name, student.flatten(0, 1), teacher.flatten(0, 1), None if mask is None else mask.flatten()


def cross_correlation(comparison: Comparison) -> Tensor:
    """SDP-CC: the cross-correlation loss of student and teacher features, divided by the number of features.

    The division is ours: it makes the weight independent of the width. Rows are the examples or tokens of one
    batch, those of all processes together, so with gradient accumulation the loss sees one micro-batch at a time; a
    queue adds the rows of earlier ones, without gradients. A single row has no correlation and adds 0.
    """
    return _mean([_correlate(comparison, *each) for each in comparison.rows()])


def _correlate(comparison: Comparison, name: str, student: Tensor, teacher: Tensor, mask: Tensor | None) -> Tensor:
    config, group = comparison.config, comparison.group
    if mask is not None and (config.queue_size or group is not None):
        # a queue takes the rows that count, and processes exchange no others; selecting them waits for a GPU
        student, teacher, mask = student[mask], teacher[mask], None
    if config.queue_size:
        queue = comparison.queues.setdefault(f"{comparison.term}:{name}", SavedRowQueue(config.queue_size))
        student, teacher = queue.extend(student, teacher)
    # Looking into the mask would stall a GPU in every step: there the factor below says whether two rows count.
    looked_into = mask is not None and mask.device.type == "cpu"
    count = int(mask.count_nonzero()) if mask is not None and looked_into else len(student)
    if _total(count, group, student.device) < 2:
        return student[:0].sum()
    loss = cross_correlation_loss(
        student,
        teacher,
        off_diagonal_weight=config.off_diagonal_weight,
        center=config.center,
        target=cast(Literal["identity", "teacher"], config.correlation_target),
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
    if _none_counts(comparison.positions):
        return comparison.student["logits"][:0].sum()
    return kl_divergence_loss(
        comparison.student["logits"],
        comparison.teacher["logits"],
        temperature=comparison.config.temperature,
        sample_weight=comparison.positions,
    )


def cosine(comparison: Comparison) -> Tensor:
    """SDP-Cos: 1 - cosine of student and teacher features, mean over rows; 0 where none counts."""
    return _mean([_cosine_distance(s, t, mask) for _, s, t, mask in comparison.rows()])


def _cosine_distance(student: Tensor, teacher: Tensor, mask: Tensor | None) -> Tensor:
    return student[:0].sum() if _none_counts(mask) else cosine_distance_loss(student, teacher, sample_weight=mask)


def _none_counts(mask: Tensor | None) -> bool:
    """Tell whether a CPU's mask leaves all rows out, which the losses refuse there; on a GPU they are 0 unasked."""
    return mask is not None and mask.device.type == "cpu" and not bool(mask.any())


def mse(comparison: Comparison) -> Tensor:
    """Mean over rows and features of the squared difference of student and teacher, in at least fp32."""
    return _mean([_mean_squared_difference(s, t, mask) for _, s, t, mask in comparison.rows()])


def _mean_squared_difference(student: Tensor, teacher: Tensor, mask: Tensor | None) -> Tensor:
    dtype = torch.promote_types(torch.promote_types(student.dtype, teacher.dtype), torch.float32)
    difference = student.to(dtype) - teacher.to(dtype)
    if mask is None:
        return difference.square().mean()
    difference = difference.masked_fill(~mask.unsqueeze(-1), 0.0)  # before the square: padding may hold NaN
    return difference.square().sum() / (mask.count_nonzero().clamp(min=1) * student.shape[1])


def aligned_cosine(comparison: Comparison) -> Tensor:
    """AWR: 1 - cosine of the rows of every masked weight and the teacher's weight of that name."""
    return _aligned(comparison, "cosine")


def aligned_frobenius(comparison: Comparison) -> Tensor:
    """AWR: squared distance of every masked weight from the teacher's, over the squared norm of the teacher's."""
    return _aligned(comparison, "frobenius")


def _aligned(comparison: Comparison, kind: Literal["cosine", "frobenius"]) -> Tensor:
    student, teacher = comparison.models
    layers = masked_layers(student)
    return aligned_weight_loss(
        [matrix(layer) for layer in layers.values()],
        [matrix(teacher.get_submodule(name)) for name in layers],
        kind=kind,
        masks=[layer.bit_mask for layer in layers.values()],
    )


def _mean(values: list[Tensor]) -> Tensor:
    return values[0] if len(values) == 1 else torch.stack(values).mean()


OBJECTIVES: dict[str, Callable[[Comparison], Tensor]] = {
    "cross_correlation": cross_correlation,
    "kl": kl,
    "cosine": cosine,
    "mse": mse,
    "aligned_cosine": aligned_cosine,
    "aligned_frobenius": aligned_frobenius,
}


def needs(config: SDPruneConfig) -> set[str]:
    """Return what the terms of `config` compare: of "logits", "rows" and "weights"."""
    return {COMPARED[split_term(term)[0]] for term in config.distillation_weights}


def term_features(config: SDPruneConfig, term: str) -> tuple[str, ...]:
    """Return the names of the features that a term of `config.distillation` compares; () where it compares weights."""
    compared = COMPARED[split_term(term)[0]]
    return row_names(config, term) if compared == "rows" else ("logits",) if compared == "logits" else ()


def feature_names(config: SDPruneConfig) -> tuple[str, ...]:
    """Return the names of the features that the terms of `config` compare; () where weights alone are."""
    return tuple(dict.fromkeys(name for term in config.distillation_weights for name in term_features(config, term)))


def distillation_terms(comparison: Comparison) -> dict[str, Tensor]:
    """Return every distillation term of the configuration by name, unweighted."""
    return {
        term: OBJECTIVES[split_term(term)[0]](replace(comparison, term=term))
        for term in comparison.config.distillation_weights
    }
