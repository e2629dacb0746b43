"""What a distillation refuses before anything is trained or written."""

import logging
from collections.abc import Iterable, Mapping
from typing import Any, cast

from torch import nn
from torch.utils.data import IterableDataset

from sdprune.config import SDPruneConfig, split_term
from sdprune.distillation.features import body_of
from sdprune.distillation.terms import feature_names, objective_of, term_features
from sdprune.masking.linears import is_linear, matrix
from sdprune.masking.swap import masked_layers
from sdprune.methods.criteria import CRITERIA

logger = logging.getLogger(__name__)


def has_rows(dataset: Any) -> bool:
    """Tell a data set with rows by number from a stream, whose rows come once and in an order of its own."""
    known = hasattr(dataset, "__len__") and hasattr(dataset, "__getitem__")
    return known and not isinstance(dataset, IterableDataset)  # torch's inherits __getitem__ all the same


def check_config(config: Any) -> None:
    """Raise TypeError if it is no `SDPruneConfig`."""
    if not isinstance(config, SDPruneConfig):
        raise TypeError(f"config must be an SDPruneConfig, got {config!r:.80}")


def check_trainable(model: nn.Module, config: SDPruneConfig | None = None) -> None:
    """Raise ValueError if nothing of a model trains; say in the log which pruned layers do not.

    Args:
        model: what is to be trained.
        config: how its masked layers are pruned; None: they are not looked at.
    """
    if not any(parameter.requires_grad for parameter in model.parameters()):
        raise ValueError("no parameter of the model requires a gradient; call model.requires_grad_(True) first")
    if config is None:
        return
    frozen = [name for name, layer in masked_layers(model).items() if not layer.weight.requires_grad]
    if frozen and CRITERIA[config.criterion].update is not None:
        raise ValueError(
            f"criterion={config.criterion!r} ranks by gradients, but the weight of layer {frozen[0]!r} requires none "
            f"({len(frozen)} such layers); call requires_grad_(True), or name them in exclude_modules"
        )
    if frozen:
        logger.warning(
            "layer %r is pruned, but its weight is frozen (requires_grad=False), so that it cannot recover; %d such "
            "layers",
            frozen[0],
            len(frozen),
        )


def check_objectives(model: nn.Module, config: SDPruneConfig, who: str = "the model", *, masked: bool = True) -> None:
    """Raise ValueError if an objective of `config` does not fit the model.

    Args:
        model: the student or the teacher.
        config: the objectives.
        who: how messages call the model.
        masked: whether it must have masked layers for the objectives that compare weights.
    """
    model_config = getattr(model, "config", None)
    terms = {term: objective_of(term) for term in config.distillation_weights}
    for term in (term for term, objective in terms.items() if objective.distribution):
        if getattr(model_config, "problem_type", None) == "multi_label_classification":
            raise ValueError(
                f"distillation {term!r} compares one distribution over the classes, but {who} predicts several labels "
                "at once; take 'mse' with representation='logits'"
            )
        if not generates(model) and getattr(model_config, "num_labels", None) == 1:
            raise ValueError(
                f"distillation {term!r} compares class probabilities, but {who} predicts one number; take 'mse' with "
                "representation='logits'"
            )
    names = ", ".join(repr(term) for term, objective in terms.items() if objective.compares == "weights")
    if masked and names and not masked_layers(model):
        raise ValueError(
            f"distillation {names} compares masked weights, but the model has none; pass SDPruneCallback in "
            "callbacks=[...] of the Trainer"
        )
    for term in terms:
        _check_features(model, config, term, who)


def _check_features(model: nn.Module, config: SDPruneConfig, term: str, who: str) -> None:
    """Raise ValueError if a model has not what a term of the distillation compares."""
    own, features = split_term(term)[1], term_features(config, term)
    if "pooled" in features and getattr(body_of(model), "pooler", None) is None:
        where = f"distillation {term!r}" if own else "representation='pooled'"
        raise ValueError(f"{where}, but {who} has no pooler; choose first, mean or tokens")
    layers = getattr(getattr(model, "config", None), "num_hidden_layers", None)
    if layers is None:
        return
    chosen = [int(feature.partition("@")[2]) for feature in features if "@" in feature]
    outside = [layer for layer in chosen if not -layers - 1 <= layer <= layers]
    if outside:
        where = f"distillation {term!r}: the hidden state" if "@" in own else "hidden_layers"
        raise ValueError(
            f"{where} must lie in [{-layers - 1}, {layers}] for {who} with its {layers} layers, got {outside}"
        )


def generates(model: nn.Module) -> bool:
    """Tell whether the model writes text: its classes are its vocabulary."""
    can_generate = getattr(model, "can_generate", None)
    return bool(can_generate is not None and can_generate())


def check_teacher(student: nn.Module, teacher: nn.Module, config: SDPruneConfig) -> None:
    """Raise ValueError if a teacher cannot teach this student: what it reads, predicts or holds differs."""
    check = {"vocab_size": "a vocabulary of {}"}
    if "logits" in feature_names(config):
        check["num_labels"] = "{} classes"
    if set(feature_names(config)) - {"logits"}:
        check["hidden_size"] = "hidden states of width {}"
    for attribute, words in check.items():
        theirs, ours = (getattr(getattr(model, "config", None), attribute, None) for model in (teacher, student))
        if theirs != ours:
            raise ValueError(f"teacher_model has {words.format(theirs)}, the model has {words.format(ours)}")
    if "logits" in feature_names(config):
        theirs, ours = (_label_names(model) for model in (teacher, student))
        if theirs != ours and sorted(theirs) == sorted(ours):
            raise ValueError(
                f"teacher_model has its classes in another order ({', '.join(theirs)}) than the model "
                f"({', '.join(ours)}); logits are compared one by one"
            )
    if any(objective_of(term).compares == "weights" for term in config.distillation_weights):
        weights = {name: matrix(module).shape for name, module in teacher.named_modules() if is_linear(module)}
        for name, layer in masked_layers(student).items():
            found = weights.get(name)
            if found != matrix(layer).shape:
                has = "no such weight" if found is None else f"shape {tuple(found)}"
                raise ValueError(
                    f"weights are compared by name: {name}.weight has shape "
                    f"{tuple(matrix(layer).shape)} in the model, {has} in teacher_model"
                )


def _label_names(model: nn.Module) -> list[str]:
    names: Mapping[Any, Any] = getattr(getattr(model, "config", None), "id2label", None) or {}
    return [str(names[key]).casefold() for key in sorted(names, key=int)]


def check_classes(model: nn.Module, labels: Iterable[Any], where: str) -> None:
    """Raise ValueError if a label names a class that a classifier does not have.

    Args:
        model: only one that tells one class of several is looked at; of rows or of their words.
        labels: of rows, or lists of those of their words, where -100 stands for none; floating-point ones are numbers;
            tensors and arrays as well.
        where: what holds them, for the message.
    """
    config = getattr(model, "config", None)
    classes = getattr(config, "num_labels", None) or 1
    kind = getattr(config, "problem_type", None) or "single_label_classification"
    if kind == "multi_label_classification":
        _check_indicators(classes, labels, where)
    if classes == 1 or generates(model) or kind != "single_label_classification":
        return
    plain = (item.tolist() if hasattr(item, "tolist") else item for item in labels)
    found = {label for item in plain for label in (item if isinstance(item, list) else [item])}
    unknown = sorted(label for label in found if isinstance(label, int) and label != -100 and not 0 <= label < classes)
    if unknown:
        raise ValueError(
            f"{where} must lie in [0, {classes - 1}] for the model with its {classes} classes, got {unknown}"
        )


def _check_indicators(classes: int, labels: Iterable[Any], where: str) -> None:
    for label in labels:
        row = label.tolist() if hasattr(label, "tolist") else label
        if not (isinstance(row, list | tuple) and len(row) == classes and all(type(each) is float for each in row)):
            raise ValueError(
                f"{where} must hold {classes} floating-point numbers a row, 1.0 for every class that it has, for the "
                f"model with problem_type 'multi_label_classification', got {row!r}"
            )


def labels_of(dataset: Any, row: Mapping[str, Any], name: str) -> Iterable[Any]:
    """Return every label in a column of a table of `datasets`, once; of other data sets that of `row` alone."""
    if not hasattr(dataset, "select_columns") or name not in dataset.column_names:
        return [row[name]]
    column = dataset.select_columns(name).with_format("arrow")[:][name].combine_chunks()  # rows would take seconds
    if hasattr(column, "flatten"):  # labels of words
        column = column.flatten()
    return cast(Iterable[Any], column.unique().to_pylist())


def check_labels(row: Mapping[str, Any], label_names: Iterable[str], config: SDPruneConfig) -> None:
    """Raise ValueError if a collated row has no labels although the task loss needs them."""
    if config.task_weight > 0.0 and not any(name in row for name in label_names):
        raise ValueError(
            f"the task loss needs labels, but the training data give only {', '.join(sorted(row))}; add a column "
            f"{' or '.join(label_names)}, or set task_weight=0 to learn from the teacher alone"
        )
