"""Loading a classifier for a task, with errors that say what to do."""

import logging
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from sdprune.data.labels import Target, match_classes, target_of
from sdprune.data.tasks import Task
from sdprune.formats.files import WeightFiles
from sdprune.formats.model_config import read_config
from sdprune.layers.forms import int8_names, plain_copy

TEXTS, TOKENS = "ForSequenceClassification", "ForTokenClassification"  # in the names of classes of models

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Classifier:
    """A model with its tokenizer.

    Args:
        model: a classifier of texts, or of tokens, in float32.
        tokenizer: its tokenizer.
        trained_head: whether the classification head came with the weights.
        dtype: of the weights as they came.
    """

    model: nn.Module
    tokenizer: Any
    trained_head: bool
    dtype: torch.dtype = torch.float32


def model_target(name: str, label_type: str | None = None, *, trust_remote_code: bool = False) -> Target:
    """Return what the labels of a file are for a model, by its configuration.

    Args:
        name: folder or hub id of the model.
        label_type: what the user says of the labels; None: nothing.
        trust_remote_code: whether code that the model brings along may run.

    Raises:
        ValueError: the folder holds no model, or the model predicts several numbers a row.
        OSError: neither a folder nor reachable on the hub.
    """
    check_model_folder(name)
    config = _config(name, trust_remote_code)
    tagged = _has_head(config, TOKENS)
    return target_of(config, label_type, trained=tagged or _has_head(config, TEXTS), tagged=tagged)


def load_classifier(
    name: str, task: Task, *, trust_remote_code: bool = False, all_classes: bool = False, scored: bool = False
) -> Classifier:
    """Load a classifier for `task` from a folder or the hub; a missing head is made for the task's classes.

    It classifies tokens where the task's words have labels. It may know more classes than the task: a small file
    rarely has all of them. All its layers are dense, with zeros, also where the checkpoint tells sparse ones. Where the
    model does not say how rows are padded, its tokenizer does, and the other way round.

    Args:
        name: folder or hub id of the model.
        task: the labelled text.
        trust_remote_code: whether code that the model brings along may run.
        all_classes: whether the task has all classes that the model must know.
        scored: whether the model is only scored: layers in int8, which round their inputs, stay what they are then.

    Raises:
        ValueError: the folder has no config.json or no weights, the model has other classes than the task, nobody says
            how to pad, or the model needs code of its own that may not run.
        OSError: neither a folder nor reachable on the hub.
    """
    from transformers import AutoModelForSequenceClassification, AutoModelForTokenClassification

    check_model_folder(name)
    head = TOKENS if task.tagged else TEXTS
    auto_class = AutoModelForTokenClassification if task.tagged else AutoModelForSequenceClassification
    classes = max(len(task.label_names), 1)
    config = _config(name, trust_remote_code)
    dtype = _stored_dtype(name, config)
    try:
        tokenizer = _load_tokenizer(name, task, trust_remote_code)
        trained_head = _has_head(config, head)
        if not trained_head:
            config.num_labels = classes
            if task.label_names:
                config.id2label = dict(enumerate(task.label_names))
                config.label2id = {label: index for index, label in enumerate(task.label_names)}
        if task.listed or not task.label_names:  # otherwise transformers decides by the type of the labels
            config.problem_type = "multi_label_classification" if task.listed else "regression"
        model = auto_class.from_pretrained(
            name, config=config, dtype=torch.float32, trust_remote_code=trust_remote_code
        )
    except OSError as error:
        raise OSError(f"cannot load model {name!r}: {_one_line(error)}") from None
    enough = config.num_labels > classes and task.label_names and not (all_classes and not task.tagged)
    if config.num_labels != classes and not enough:
        raise ValueError(
            f"model {name!r} has {config.num_labels} classes, but the labels of {task.name!r} are "
            f"{', '.join(task.label_names) or 'numbers'}: {classes} expected"
        )
    _agree_on_padding(model, tokenizer, name)
    if getattr(model, "hf_quantizer", None) is not None and not (scored and int8_names(model)):
        model = plain_copy(model)
    return Classifier(model, tokenizer, trained_head, dtype)


def _config(name: str, trust_remote_code: bool) -> Any:
    try:
        return read_config(name, trust_remote_code=trust_remote_code)
    except OSError as error:
        raise OSError(f"cannot load model {name!r}: {_one_line(error)}") from None


def _has_head(config: Any, head: str) -> bool:
    return any(head in kind for kind in config.architectures or ())


def _stored_dtype(name: str, config: Any) -> torch.dtype:
    """The dtype of a checkpoint: as it tells itself, or else of its first matrix."""
    dtype = getattr(config, "dtype", None)
    if isinstance(dtype, torch.dtype):
        return dtype
    if not any(Path(name).glob("*.safetensors")):
        return torch.float32
    files = WeightFiles.of(Path(name))
    tensors = (files.read(key) for key in files.names())
    return next((tensor.dtype for tensor in tensors if tensor.is_floating_point() and tensor.dim() == 2), torch.float32)


def _agree_on_padding(model: Any, tokenizer: Any, name: str) -> None:
    """Let model and tokenizer pad by the same token, in place: the tokenizer's, the model's, or the end of the text."""
    config = model.config.get_text_config()
    if tokenizer.pad_token_id is None and config.pad_token_id is not None:
        tokenizer.pad_token = tokenizer.convert_ids_to_tokens(config.pad_token_id)
    elif tokenizer.pad_token_id is None and tokenizer.eos_token is not None:
        logger.info("neither model nor tokenizer has a padding token: rows are padded with %r", tokenizer.eos_token)
        tokenizer.pad_token = tokenizer.eos_token
    place = tokenizer.pad_token_id
    if place is None:
        raise ValueError(
            f"model {name!r} has no padding token, neither its tokenizer nor config.json (pad_token_id); set one, such "
            "as tokenizer.pad_token = '[PAD]', and save the tokenizer in the folder"
        )
    rows = model.get_input_embeddings().num_embeddings
    if place >= rows:
        raise ValueError(
            f"the tokenizer of model {name!r} pads with token {place}, but the model has {rows} embeddings; "
            "call model.resize_token_embeddings(len(tokenizer)) and save it"
        )
    if config.pad_token_id is None:
        model.config.pad_token_id = config.pad_token_id = place


def _load_tokenizer(name: str, task: Task, trust_remote_code: bool) -> Any:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(name, trust_remote_code=trust_remote_code)
    if task.tagged and tokenizer.is_fast and "ByteLevel" in tokenizer.backend_tokenizer.to_str():
        # byte-level vocabularies hold the space before a word in its first piece; a list of words has no spaces
        return AutoTokenizer.from_pretrained(name, add_prefix_space=True, trust_remote_code=trust_remote_code)
    return tokenizer


def align_labels(task: Task, model: Any) -> Task:
    """Renumber the labels of `task` in the order of the model's classes.

    Labels are names; how they are matched, `sdprune.data.labels.match_classes` tells, and the log says it. They may
    lack some of the model's classes: a small file rarely has all of them.

    Raises:
        ValueError: both have names, and they differ; or it is not certain which class a label is.
    """
    names = [str(model.config.id2label.get(index, "")) for index in range(max(model.config.num_labels, 1))]
    if not task.label_names or tuple(names) == task.label_names:
        return task
    matched = match_classes(task.label_names, names)
    if matched is None:
        ours, theirs = (_folded(each) for each in (task.label_names, names))
        advice = ", or name label_separator" if task.listed else ""
        raise ValueError(
            f"the labels of {task.name!r} are {', '.join(ours)}, those of the model are {', '.join(theirs)}; "
            f"rename one of them (id2label in config.json, or the labels of the data){advice}"
        )
    order, reason = matched
    logger.info("the labels of %s are matched with the classes of the model %s", task.name, reason)
    own = dict(zip(order, task.label_names, strict=True))
    missing = [name for index, name in enumerate(names) if index not in own]
    if missing:
        logger.info("%s: no row has the label %s", task.name, ", ".join(map(repr, missing)))
    if order == list(range(len(names))):
        return task
    label_names = tuple(own.get(index, name) for index, name in enumerate(names))
    return replace(task.map(lambda examples: examples.renumbered(order)), label_names=label_names)


def _folded(names: Sequence[str]) -> Sequence[str]:
    """Names as they are compared: without case, where they differ by more than that."""
    folded = [name.casefold() for name in names]
    return folded if len(set(folded)) == len(set(names)) else names


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
