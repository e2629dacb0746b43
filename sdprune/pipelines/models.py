"""Loading a classifier for a task, with errors that say what to do."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from sdprune.data.examples import Examples
from sdprune.data.tasks import Task
from sdprune.deployment.export import plain_copy


@dataclass(frozen=True)
class Classifier:
    """A model with its tokenizer.

    Args:
        model: a sequence-classification model.
        tokenizer: its tokenizer.
        trained_head: whether the classification head came with the weights.
    """

    model: nn.Module
    tokenizer: Any
    trained_head: bool


def load_classifier(name: str, task: Task) -> Classifier:
    """Load a sequence classifier for `task` from a folder or the hub; a missing head is made for the task's classes.

    All its layers are dense, with zeros, also where the checkpoint tells sparse ones.

    Raises:
        ValueError: the folder has no config.json or no weights, or the model has other classes than the task.
        OSError: neither a folder nor reachable on the hub.
    """
    from transformers import AutoConfig, AutoModelForSequenceClassification, AutoTokenizer

    check_model_folder(name)
    classes = max(len(task.label_names), 1)
    try:
        config = AutoConfig.from_pretrained(name)
        tokenizer = AutoTokenizer.from_pretrained(name)
        trained_head = any("ForSequenceClassification" in kind for kind in config.architectures or ())
        if not trained_head:
            config.num_labels = classes
            if task.label_names:
                config.id2label = dict(enumerate(task.label_names))
                config.label2id = {label: index for index, label in enumerate(task.label_names)}
        model = AutoModelForSequenceClassification.from_pretrained(name, config=config, dtype=torch.float32)
    except OSError as error:
        raise OSError(f"cannot load model {name!r}: {_one_line(error)}") from None
    if config.num_labels != classes:
        raise ValueError(
            f"model {name!r} has {config.num_labels} classes, but the labels of {task.name!r} are "
            f"{', '.join(task.label_names) or 'numbers'}: {classes} expected"
        )
    if getattr(model, "hf_quantizer", None) is not None:
        model = plain_copy(model)
    return Classifier(model, tokenizer, trained_head)


def align_labels(task: Task, model: Any) -> Task:
    """Renumber the labels of `task` in the order of the model's classes.

    Labels are matched by name, without regard to case; by position where the model only numbers its classes
    ("LABEL_0") or the labels are whole numbers.

    Raises:
        ValueError: both have names, and they differ.
    """
    theirs = [str(model.config.id2label.get(index, "")).lower() for index in range(len(task.label_names))]
    ours = [label.lower() for label in task.label_names]
    positional = all(name.startswith("label_") for name in theirs) or all(name.isdecimal() for name in ours)
    if theirs == ours or positional:
        return task
    if sorted(theirs) != sorted(ours):
        raise ValueError(
            f"the labels of {task.name!r} are {', '.join(ours)}, those of the model are {', '.join(theirs)}; "
            "rename one of them (id2label in config.json, or the labels of the data)"
        )
    order = [theirs.index(label) for label in ours]

    def renumbered(examples: Examples) -> Examples:
        return replace(examples, labels=tuple(order[int(label)] for label in examples.labels))

    return replace(
        task,
        label_names=tuple(task.label_names[order.index(index)] for index in range(len(order))),
        train=renumbered(task.train),
        validation=renumbered(task.validation),
        test=renumbered(task.test),
    )


def check_model_folder(name: str) -> None:
    """Refuse folders without a model, and paths that are no folder; other names may be on the hub.

    Raises:
        ValueError: what is missing.
    """
    folder = Path(name)
    if not folder.is_dir():
        if folder.exists() or name.startswith((".", "/", "~")):
            raise ValueError(f"model {name!r} is not a folder")
        return
    if not (folder / "config.json").exists():
        raise ValueError(f"model folder {name!r} has no config.json; name a folder that save_pretrained wrote")
    weights = [*folder.glob("*.safetensors"), *folder.glob("pytorch_model*.bin")]
    if not weights:
        raise ValueError(
            f"model folder {name!r} has no weights (*.safetensors); name a folder that save_pretrained wrote"
        )


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split())
