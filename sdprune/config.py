"""How a model is pruned and what teaches it: a frozen dataclass, checked when it is built, to and from JSON."""

import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Self

from sdprune.config_base import CheckedConfig, unknown_key_message
from sdprune.files import write_text
from sdprune.methods.criteria import CRITERIA
from sdprune.methods.objectives import OBJECTIVES
from sdprune.methods.structures import STRUCTURES

CONFIG_NAME = "sdprune_config.json"

BLOCK_REDUCTIONS = ("sum", "mean", "max")
SCOPES = ("layer", "global")
SCHEDULES = ("one_shot", "uniform", "geometric", "cubic")
CORRELATION_TARGETS = ("identity", "teacher")
REPRESENTATIONS = ("first", "mean", "pooled", "tokens", "logits")
HIDDEN_REPRESENTATIONS = ("first", "mean", "tokens")  # these are read from any hidden state
TEACHER_DTYPES = ("float32", "bfloat16", "float16")


def split_term(term: str) -> tuple[str, str]:
    """Return the objective of a distillation term and the feature it names itself, if any.

    "mse" gives ("mse", ""), "mse@logits" ("mse", "logits"), "mse@mean@2" ("mse", "mean@2").
    """
    objective, _, feature = term.partition("@")
    return objective, feature


@dataclass(frozen=True)
class SDPruneConfig(CheckedConfig):
    """How a model is pruned and what its unpruned copy teaches it.

    Args:
        target_sparsity: fraction of the chosen weights that are zero at the end, in [0, 1).
        structure: "unstructured" (single weights), "block" (whole blocks of `block_shape`), "n:m" (of every `m`
            neighbours along the input `n` are kept), "neuron" (feed-forward neurons: rows of the first matrices and a
            column of the second), "head" (attention heads: query, key, value rows and output columns; with grouped
            queries a key/value head and all its queries), "hybrid" (feed-forward neurons, and blocks elsewhere).
            Layers that have no part in a neuron or a head are left alone by "neuron" and "head". All units of a layer
            have equally many weights, so `target_sparsity` is the fraction of units as well as of weights.
        block_shape: (out, in) size of a block; must divide every layer that is pruned in blocks.
        block_reduction: score of a block from those of its weights: "sum", "mean" or "max". Criteria that need
            gradients score blocks as a whole: "sum".
        n: how many of `m` neighbours "n:m" keeps; `target_sparsity` must be 1 - n / m.
        m: length of a group of "n:m"; must divide the input size of every layer.
        criterion: what ranks the weights: "random", "magnitude", "gradient" (|gradient * weight|), "taylor" (its
            square), "lookahead", "lamp" (for scope "global"), "movement", "soft_movement", "l0" (hard concrete gates),
            "epsd" (sensitivity of the loss before any training; one_shot). The last six and "gradient" measure
            while training, so the first pruning step needs a start_ratio > 0.
        magnitude_norm: 1 or 2, the norm by which "magnitude" ranks units of several weights.
        sparsity_penalty: weight of the regularizer of "soft_movement" and "l0", which drives scores down, >= 0.
        score_learning_rate: step size of the scores of "soft_movement" and "l0", > 0.
        min_layer_density: fraction of its units that every layer keeps, whatever the ranking says, in [0, 1), to one
            unit. With 0 a "global" ranking may leave nothing of a layer, which is an error.
        scope: "layer" (every matrix reaches the target) or "global" (one ranking over all matrices).
        schedule: path of the sparsity over the pruning steps: "one_shot", "uniform" (equal steps), "geometric"
            (an equal fraction of the remaining weights a step), "cubic" (fast, then slow).
        start_ratio: fraction of the training at which the first pruning step happens, in [0, 1].
        end_ratio: fraction of the training at which the last pruning step happens, in [start_ratio, 1].
        pruning_steps: number of pruning steps; 1 with "one_shot".
        lr_restarts: whether the learning rate restarts after every pruning step and falls to a tenth before the next
            (GMP*, https://arxiv.org/abs/2210.06384), instead of following the schedule of the training.
        target_modules: regular expression or several; a linear layer is pruned if one matches its whole dotted
            name. None: every linear layer of the encoder or decoder, without embeddings and heads.
        exclude_modules: regular expression or several; what matches is left alone.
        task_weight: factor of the task loss, >= 0; with 0 the data need no labels.
        distillation: "cross_correlation", "kl", "cosine", "mse", "aligned_cosine", "aligned_frobenius", a mapping of
            these names to weights, or None. The three that compare a representation may name their own, and a hidden
            state of it: {"cross_correlation@first": 1.0, "mse@logits": 0.5, "mse@mean@2": 0.1}.
        distillation_weight: factor of the whole distillation sum beside the task loss, >= 0.
        gradient_ratio: if given, the distillation weight is steered so that the norm of the distillation gradient is
            this many times that of the task gradient, beginning with `distillation_weight`, > 0.
        gradient_ratio_steps: optimizer steps between two measurements of the gradients for `gradient_ratio`.
        temperature: softens the logits of "kl", > 0.
        off_diagonal_weight: weight of the off-diagonal terms of "cross_correlation", >= 0.
        correlation_target: "identity" (the paper) or "teacher" (the teacher's own correlation).
        center: whether "cross_correlation" subtracts each feature's mean over the rows.
        queue_size: rows of earlier batches that "cross_correlation" sees beside those of the batch.
        representation: what "cross_correlation", "cosine" and "mse" compare unless they name it themselves: "first"
            token, "mean" over unpadded tokens or all unpadded "tokens" of the hidden states, the "pooled" output, or
            the "logits".
        hidden_layers: which hidden states are compared, averaged over them: 0 is the embedding, 1 the first layer, -1
            the last, counted in student and teacher apart. None: the final output of the body. What names its own
            hidden state, the pooled output and the logits take no notice.
        teacher_dtype: float type of the teacher's weights, "float32", "bfloat16" or "float16"; None: as they are.
        teacher_cache: folder for the teacher's outputs, computed once for every example; None: the teacher runs on
            every batch.
        teacher_cache_gigabytes: most that `teacher_cache` may take, in 1e9 bytes; more is an error.
        diagnostics_steps: optimizer steps between two measurements of class separability and signal-to-noise; None:
            none.
        diagnostics_examples: how many of the first evaluation examples are measured.
        seed: seed of the run, where no TrainingArguments with a seed of their own are given.

    Raises:
        ValueError: a value outside its range; the message names the field, the value and what is allowed.
        TypeError: a value of the wrong type.
    """

    target_sparsity: float = 0.5
    structure: str = "unstructured"
    block_shape: tuple[int, int] = (32, 32)
    block_reduction: str = "sum"
    n: int = 2
    m: int = 4
    criterion: str = "magnitude"
    magnitude_norm: int = 1
    sparsity_penalty: float = 1.0
    score_learning_rate: float = 0.01
    min_layer_density: float = 0.0
    scope: str = "layer"
    schedule: str = "geometric"
    start_ratio: float = 0.0
    end_ratio: float = 0.6
    pruning_steps: int = 16
    lr_restarts: bool = False
    target_modules: str | tuple[str, ...] | None = None
    exclude_modules: str | tuple[str, ...] | None = None
    task_weight: float = 1.0
    distillation: str | Mapping[str, float] | None = "cross_correlation"
    distillation_weight: float = 1.0
    gradient_ratio: float | None = None
    gradient_ratio_steps: int = 10
    temperature: float = 2.0
    off_diagonal_weight: float = 5e-3
    correlation_target: str = "identity"
    center: bool = True
    queue_size: int = 0
    representation: str = "tokens"
    hidden_layers: tuple[int, ...] | None = None
    teacher_dtype: str | None = None
    teacher_cache: str | None = None
    teacher_cache_gigabytes: float = 4.0
    diagnostics_steps: int | None = None
    diagnostics_examples: int = 256
    seed: int = 0

    def __post_init__(self) -> None:
        self._check_types()
        if not 0.0 <= self.target_sparsity < 1.0:
            raise ValueError(f"target_sparsity must lie in [0, 1), got {self.target_sparsity!r}")
        self._check_choice("structure", STRUCTURES)
        self._check_choice("criterion", CRITERIA)
        self._check_choice("scope", SCOPES)
        self._check_choice("schedule", SCHEDULES)
        self._check_choice("correlation_target", CORRELATION_TARGETS)
        self._check_choice("representation", REPRESENTATIONS)
        if min(self.block_shape) < 1:
            raise ValueError(f"block_shape must hold two positive sizes (out, in), got {self.block_shape!r}")
        if not 0.0 <= self.start_ratio <= self.end_ratio <= 1.0:
            raise ValueError(
                "start_ratio and end_ratio must satisfy 0 <= start_ratio <= end_ratio <= 1, "
                f"got {self.start_ratio!r} and {self.end_ratio!r}"
            )
        self._check_numbers("pruning_steps", least=1)
        if self.schedule == "one_shot" and self.pruning_steps != 1:
            raise ValueError(f"pruning_steps must be 1 with schedule='one_shot', got {self.pruning_steps}")
        self._check_selection()
        for name, weight in self.distillation_weights.items():
            _check_term(name)
            if not (math.isfinite(weight) and weight >= 0.0):
                raise ValueError(f"distillation[{name!r}] must be a finite number >= 0, got {weight!r}")
        self._check_distillation()
        self._check_numbers("seed", least=0)

    def _check_distillation(self) -> None:
        self._check_numbers("task_weight", "distillation_weight", "off_diagonal_weight", least=0.0)
        self._check_numbers("queue_size", least=0)
        self._check_numbers("gradient_ratio_steps", "diagnostics_examples", "diagnostics_steps", least=1)
        self._check_numbers("temperature", "gradient_ratio", "teacher_cache_gigabytes", above=0)
        if self.teacher_dtype is not None:
            self._check_choice("teacher_dtype", TEACHER_DTYPES)
        read = {self.representation, *(split_term(term)[1] for term in self.distillation_weights)}
        if self.hidden_layers is not None and not (self.hidden_layers and read.intersection(HIDDEN_REPRESENTATIONS)):
            raise ValueError(
                "hidden_layers must name at least one hidden state, and goes with representation 'first', 'mean' or "
                f"'tokens'; got {self.hidden_layers!r} with representation={self.representation!r}"
            )
        trained = self.task_weight > 0.0 and self.distillation_weight > 0.0 and any(self.distillation_weights.values())
        if self.gradient_ratio is not None and not trained:
            raise ValueError(
                f"gradient_ratio={self.gradient_ratio} needs a task loss and a distillation to weigh against it, got "
                f"task_weight={self.task_weight}, distillation_weight={self.distillation_weight}, "
                f"distillation={self.distillation!r}"
            )
        if self.task_weight == 0.0 and not self.distillation_weights:
            raise ValueError("task_weight must be above 0 without distillation, got 0.0: nothing would be learnt")

    def _check_selection(self) -> None:
        """Check what decides which units go."""
        self._check_choice("block_reduction", BLOCK_REDUCTIONS)
        criterion, groups = CRITERIA[self.criterion], STRUCTURES[self.structure].groups
        if self.block_reduction != "sum" and criterion.update is not None:
            raise ValueError(
                f"block_reduction must be 'sum' with criterion={self.criterion!r}, which scores blocks as a whole, got "
                f"{self.block_reduction!r}"
            )
        n, m = (self.n, self.m) if groups is None else groups(self)
        if not 0 < n <= m:
            raise ValueError(f"n and m must satisfy 0 < n <= m, got n={n} and m={m}")
        if groups is not None:
            if abs(self.target_sparsity - (1.0 - n / m)) > 1e-9:
                raise ValueError(
                    f"target_sparsity must be 1 - n / m = {1.0 - n / m} with structure={self.structure!r}, n={n} and "
                    f"m={m}, got {self.target_sparsity!r}"
                )
            if self.scope == "global":
                raise ValueError(
                    f"scope must be 'layer' with structure={self.structure!r}, whose groups all keep n, got 'global'"
                )
        if self.magnitude_norm not in (1, 2):
            raise ValueError(f"magnitude_norm must be 1 or 2, got {self.magnitude_norm}")
        self._check_numbers("sparsity_penalty", least=0.0)
        self._check_numbers("score_learning_rate", above=0)
        if not 0.0 <= self.min_layer_density < 1.0:
            raise ValueError(f"min_layer_density must lie in [0, 1), got {self.min_layer_density!r}")
        if self.min_layer_density > 1.0 - self.target_sparsity:
            raise ValueError(
                f"min_layer_density must be at most 1 - target_sparsity = {1.0 - self.target_sparsity:.6g}, "
                f"got {self.min_layer_density}"
            )
        if criterion.before_training and self.schedule != "one_shot":
            raise ValueError(f"schedule must be 'one_shot' with criterion={self.criterion!r}, got {self.schedule!r}")

    @property
    def distillation_weights(self) -> dict[str, float]:
        """The weight of every distillation term; empty without distillation."""
        if self.distillation is None:
            return {}
        if isinstance(self.distillation, str):
            return {self.distillation: 1.0}
        return dict(self.distillation)

    def save_pretrained(self, directory: str | Path) -> None:
        """Write `sdprune_config.json` into `directory`."""
        write_text(Path(directory) / CONFIG_NAME, json.dumps(self.to_dict(), indent=2) + "\n")

    @classmethod
    def from_pretrained(cls, directory: str | Path) -> Self:
        """Read `sdprune_config.json` of `directory`."""
        return cls.from_dict(json.loads((Path(directory) / CONFIG_NAME).read_text(encoding="utf-8")))


def _check_term(term: str) -> None:
    """Raise ValueError if a key of `distillation` is no objective, or names a feature that this cannot compare."""
    objective, feature = split_term(term)
    if objective not in OBJECTIVES:
        where = f" {term!r}" if objective != term else ""
        raise ValueError(f"distillation{where}: " + unknown_key_message(objective, OBJECTIVES))
    if objective == term:
        return
    compared = OBJECTIVES[objective].compares
    if compared != "rows":
        raise ValueError(
            f"distillation {term!r}: {objective} compares {compared} only and takes no representation, got "
            f"{feature!r}; write {objective!r}"
        )
    kind, at, layer = feature.partition("@")
    if feature in REPRESENTATIONS or (kind in HIDDEN_REPRESENTATIONS and re.fullmatch("0|-?[1-9][0-9]*", layer)):
        return
    if at and kind in REPRESENTATIONS:
        allowed = f"a hidden state is a whole number, as in 'mean@2', of {', '.join(map(repr, HIDDEN_REPRESENTATIONS))}"
    else:
        allowed = f"the representation must be one of {', '.join(map(repr, REPRESENTATIONS))}"
    raise ValueError(f"distillation {term!r}: {allowed}, got {feature!r}")
