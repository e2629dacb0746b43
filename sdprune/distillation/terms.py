"""The terms of a distillation: what each compares of a batch, handed to its objective."""

from dataclasses import dataclass

import torch
from torch import Tensor, distributed, nn

from sdp_kernels import RowQueue
from sdprune.config import SDPruneConfig, split_term
from sdprune.distillation.features import Features, row_names
from sdprune.masking.linears import matrix
from sdprune.masking.swap import masked_layers
from sdprune.methods.objectives import OBJECTIVES, Comparison, Objective, WeightComparison


@dataclass(frozen=True)
class BatchOutputs:
    """What one batch gives to compare.

    Args:
        config: the terms, and the options of their objectives.
        student: features of the student, with gradients.
        teacher: features of the teacher under the same names.
        tokens: (batch, length) bool, the positions that count in hidden states; None: all.
        positions: (batch, length) bool, the positions that count in logits; None: all.
        models: student and teacher, whose weights some objectives compare.
        queues: rows of earlier batches of every term and feature, if `config.queue_size` asks for them; filled by use.
        group: the processes over whose rows "cross_correlation" is taken together; None: this one's rows alone.
    """

    config: SDPruneConfig
    student: Features
    teacher: Features
    tokens: Tensor | None
    positions: Tensor | None
    models: tuple[nn.Module, nn.Module]
    queues: dict[str, RowQueue]
    group: distributed.ProcessGroup | None = None

    def term(self, term: str) -> Tensor:
        """Return a term of the distillation, a scalar."""
        objective = objective_of(term)
        if objective.compares == "weights":
            values = [objective.loss(self._weights())]
        else:
            values = [objective.loss(self._rows(term, name)) for name in term_features(self.config, term)]
        for value in values:
            if not isinstance(value, Tensor) or value.dim():
                found = getattr(value, "shape", value)
                raise TypeError(f"distillation {term!r}: its loss must be a scalar tensor, got {found!r}")
        return values[0] if len(values) == 1 else torch.stack(values).mean()

    def _rows(self, term: str, name: str) -> Comparison:
        student, teacher, mask, queue = self.student[name], self.teacher[name], None, None
        if student.dim() > 2:
            mask = self.positions if name == "logits" else self.tokens
            mask = None if mask is None else mask.flatten()
            student, teacher = student.flatten(0, 1), teacher.flatten(0, 1)
        if self.config.queue_size:
            queue = self.queues.setdefault(f"{term}:{name}", RowQueue(self.config.queue_size))
        return Comparison(self.config, student, teacher, mask, queue, self.group)

    def _weights(self) -> WeightComparison:
        layers = masked_layers(self.models[0])
        return WeightComparison(
            self.config,
            student=tuple(matrix(layer) for layer in layers.values()),
            teacher=tuple(matrix(self.models[1].get_submodule(name)) for name in layers),
            masks=tuple(layer.bit_mask for layer in layers.values()),
        )


def objective_of(term: str) -> Objective:
    """Return the objective of a term of the distillation."""
    return OBJECTIVES[split_term(term)[0]]


def term_features(config: SDPruneConfig, term: str) -> tuple[str, ...]:
    """Return the names of the features that a term of `config.distillation` compares; () where it compares weights."""
    compared = objective_of(term).compares
    return row_names(config, term) if compared == "rows" else ("logits",) if compared == "logits" else ()


def feature_names(config: SDPruneConfig) -> tuple[str, ...]:
    """Return the names of the features that the terms of `config` compare; () where weights alone are."""
    return tuple(dict.fromkeys(name for term in config.distillation_weights for name in term_features(config, term)))


def distillation_terms(batch: BatchOutputs) -> dict[str, Tensor]:
    """Return every distillation term of the configuration by name, unweighted; TypeError if one is no scalar."""
    return {term: batch.term(term) for term in batch.config.distillation_weights}
