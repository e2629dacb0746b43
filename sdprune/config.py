"""How a model is pruned and what teaches it: a frozen dataclass, checked when it is built, to and from JSON."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Self

from sdprune.config_base import CheckedConfig, unknown_key_message
from sdprune.files import write_text

CONFIG_NAME = "sdprune_config.json"

STRUCTURES = ("unstructured", "block")
CRITERIA = ("magnitude",)
SCOPES = ("layer", "global")
SCHEDULES = ("one_shot", "uniform", "geometric", "cubic")
OBJECTIVES = ("cross_correlation", "kl", "cosine")
CORRELATION_TARGETS = ("identity", "teacher")
REPRESENTATIONS = ("first", "mean", "pooled", "tokens")


@dataclass(frozen=True)
class SDPruneConfig(CheckedConfig):
    """How a model is pruned and what its unpruned copy teaches it.

    Args:
        target_sparsity: fraction of the chosen weights that are zero at the end, in [0, 1).
        structure: "unstructured" (single weights) or "block" (whole blocks of `block_shape`).
        block_shape: (out, in) size of a block; must divide every chosen layer when structure is "block".
        criterion: what ranks the weights: "magnitude".
        scope: "layer" (every matrix reaches the target) or "global" (one ranking over all matrices).
        schedule: path of the sparsity over the pruning steps: "one_shot", "uniform" (equal steps), "geometric"
            (an equal fraction of the remaining weights a step), "cubic" (fast, then slow).
        start_ratio: fraction of the training at which the first pruning step happens, in [0, 1].
        end_ratio: fraction of the training at which the last pruning step happens, in [start_ratio, 1].
        pruning_steps: number of pruning steps; 1 with "one_shot".
        target_modules: regular expression or several; a linear layer is pruned if one matches its whole dotted
            name. None: every linear layer of the encoder or decoder, without embeddings and heads.
        exclude_modules: regular expression or several; what matches is left alone.
        distillation: "cross_correlation", "kl", "cosine", a mapping of these names to weights, or None.
        distillation_weight: factor of the whole distillation sum beside the task loss, >= 0.
        temperature: softens the logits of "kl", > 0.
        off_diagonal_weight: weight of the off-diagonal terms of "cross_correlation", >= 0.
        correlation_target: "identity" (the paper) or "teacher" (the teacher's own correlation).
        representation: what "cross_correlation" and "cosine" compare in the last hidden state: "first" token,
            "mean" over unpadded tokens, "pooled" output, or all unpadded "tokens".
        seed: seed of the run, where no TrainingArguments with a seed of their own are given.

    Raises:
        ValueError: a value outside its range; the message names the field, the value and what is allowed.
        TypeError: a value of the wrong type.
    """

    target_sparsity: float = 0.5
    structure: str = "unstructured"
    block_shape: tuple[int, int] = (32, 32)
    criterion: str = "magnitude"
    scope: str = "layer"
    schedule: str = "geometric"
    start_ratio: float = 0.0
    end_ratio: float = 0.6
    pruning_steps: int = 16
    target_modules: str | tuple[str, ...] | None = None
    exclude_modules: str | tuple[str, ...] | None = None
    distillation: str | Mapping[str, float] | None = "cross_correlation"
    distillation_weight: float = 1.0
    temperature: float = 2.0
    off_diagonal_weight: float = 5e-3
    correlation_target: str = "identity"
    representation: str = "tokens"
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
        self._check_at_least("pruning_steps", 1)
        if self.schedule == "one_shot" and self.pruning_steps != 1:
            raise ValueError(f"pruning_steps must be 1 with schedule='one_shot', got {self.pruning_steps}")
        for name, weight in self.distillation_weights.items():
            if name not in OBJECTIVES:
                raise ValueError("distillation: " + unknown_key_message(name, OBJECTIVES))
            if not (math.isfinite(weight) and weight >= 0.0):
                raise ValueError(f"distillation[{name!r}] must be a finite number >= 0, got {weight!r}")
        self._check_at_least("distillation_weight", 0.0)
        if not (math.isfinite(self.temperature) and self.temperature > 0.0):
            raise ValueError(f"temperature must be a finite number > 0, got {self.temperature!r}")
        self._check_at_least("off_diagonal_weight", 0.0)
        self._check_at_least("seed", 0)

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
