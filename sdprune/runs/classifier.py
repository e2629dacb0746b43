"""Loading a classifier for a task, with errors that say what to do."""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from sdprune.data.tasks import Task
from sdprune.formats.model_config import read_config
from sdprune.layers.forms import plain_copy


@dataclass(frozen=True)
class Classifier:
    """A model with its tokenizer.

    Args:
        model: a classifier of texts, or of tokens.
        tokenizer: its tokenizer.
        trained_head: whether the classification head came with the weights.
    """

    model: nn.Module
    tokenizer: Any
    trained_head: bool


def load_classifier(name: str, task: Task) -> Classifier:
    """Load a classifier for `task` from a folder or the hub; a missing head is made for the task's classes.

    It classifies tokens where the task's words have labels, and may know more classes than the task then. All its
    layers are dense, with zeros, also where the checkpoint tells sparse ones.

    Raises:
        ValueError: the folder has no config.json or no weights, or the model has other classes than the task.
        OSError: neither a folder nor reachable on the hub.
    """
    from transformers import AutoModelForSequenceClassification, AutoModelForTokenClassification

    check_model_folder(name)
    head = "ForTokenClassification" if task.tagged else "ForSequenceClassification"
    auto_class = AutoModelForTokenClassification if task.tagged else AutoModelForSequenceClassification
    classes = max(len(task.label_names), 1)
    try:
        config = read_config(name)
        tokenizer = _load_tokenizer(name, task)
        trained_head = any(head in kind for kind in config.architectures or ())
        if not trained_head:
            config.num_labels = classes
            if task.label_names:
                config.id2label = dict(enumerate(task.label_names))
                config.label2id = {label: index for index, label in enumerate(task.label_names)}
        model = auto_class.from_pretrained(name, config=config, dtype=torch.float32)
    except OSError as error:
        raise OSError(f"cannot load model {name!r}: {_one_line(error)}") from None
    if config.num_labels != classes and not (task.tagged and config.num_labels > classes):
        raise ValueError(
            f"model {name!r} has {config.num_labels} classes, but the labels of {task.name!r} are "
            f"{', '.join(task.label_names) or 'numbers'}: {classes} expected"
        )
    if getattr(model, "hf_quantizer", None) is not None:
        model = plain_copy(model)
    return Classifier(model, tokenizer, trained_head)


def _load_tokenizer(name: str, task: Task) -> Any:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(name)
    if task.tagged and tokenizer.is_fast and "ByteLevel" in tokenizer.backend_tokenizer.to_str():
        # byte-level vocabularies hold the space before a word in its first piece; a list of words has no spaces
        return AutoTokenizer.from_pretrained(name, add_prefix_space=True)
    return tokenizer


def align_labels(task: Task, model: Any) -> Task:
    """Renumber the labels of `task` in the order of the model's classes.

    Labels are matched by name, without regard to case; by position where the model only numbers its classes
    ("LABEL_0") or the labels are whole numbers. Labels of words may lack some of the model's classes: a small file
    rarely has all of them.

    Raises:
        ValueError: both have names, and they differ.
    """
    names = [str(model.config.id2label.get(index, "")) for index in range(max(model.config.num_labels, 1))]
    theirs, ours = [name.lower() for name in names], [label.lower() for label in task.label_names]
    positional = all(name.startswith("label_") for name in theirs) or all(name.isdecimal() for name in ours)
    if not ours or theirs == ours or (positional and len(theirs) == len(ours)):
        return task
    if not (set(ours) <= set(theirs) if task.tagged else sorted(theirs) == sorted(ours)):
        raise ValueError(
            f"the labels of {task.name!r} are {', '.join(ours)}, those of the model are {', '.join(theirs)}; "
            "rename one of them (id2label in config.json, or the labels of the data)"
        )
    order = [theirs.index(label) for label in ours]
    own = dict(zip(order, task.label_names, strict=True))
    label_names = tuple(own.get(index, name) for index, name in enumerate(names))
    return replace(task.map(lambda examples: examples.renumbered(order)), label_names=label_names)


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
