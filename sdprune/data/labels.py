"""What labels are: one class a row, several at once, or a number; and which class of a model each one names."""

import math
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from sdprune.recipe import LABEL_TYPES

CLASS, CLASSES, NUMBER = LABEL_TYPES

_NUMBER = re.compile(r"[+-]?(\d+\.?\d*|\.\d+)(e[+-]?\d+)?", re.ASCII | re.IGNORECASE)
_NUMBERED = re.compile(r"label_\d+")


@dataclass(frozen=True)
class Target:
    """What the labels of a task are taken for, before the data are read.

    Args:
        label_type: "class", "classes" or "number"; None: as the labels themselves suggest.
        reason: why, for the log.
        trained: whether a trained model is at hand, whose classes the labels must name.
        scored: whether rows are only scored by it, so that a single class will do.
    """

    label_type: str | None = None
    reason: str = ""
    trained: bool = False
    scored: bool = False


def target_of(config: Any, label_type: str | None, *, trained: bool, tagged: bool = False) -> Target:
    """Return what a model predicts, by its configuration, where it has a trained head.

    Args:
        config: of transformers.
        label_type: what the user says of the labels; None: nothing.
        trained: whether the head came with the weights.
        tagged: whether it is a head for words.

    Raises:
        ValueError: the model predicts several numbers a row.
    """
    if label_type is not None:
        return Target(label_type, f"label_type={label_type!r}", trained)
    if not trained or tagged:
        return Target(trained=trained)
    kind, outputs = getattr(config, "problem_type", None), config.num_labels
    if kind == "regression" and outputs > 1:
        raise ValueError(f"the model predicts {outputs} numbers a row (problem_type 'regression'); one is supported")
    if kind == "multi_label_classification":
        return Target(CLASSES, f"the model has problem_type {kind!r}", trained)
    if kind == "regression" or outputs == 1:
        return Target(NUMBER, "the model has one output", trained)
    return Target(None if kind is None else CLASS, f"the model has {outputs} classes", trained)


def as_number(name: str) -> float | None:
    """Return the finite number that a label writes in decimal digits, or None."""
    value = float(name) if _NUMBER.fullmatch(name) else math.nan
    return value if math.isfinite(value) else None


def are_whole(names: Iterable[str]) -> bool:
    """Tell whether all labels write whole numbers."""
    numbers = [as_number(name) for name in names]
    return all(number is not None and number.is_integer() for number in numbers)


def sorted_names(names: Iterable[str]) -> tuple[str, ...]:
    """Return class names in the order of their numbers, if all are numbers, otherwise of their letters."""
    distinct = sorted(set(names))
    numbers = {name: as_number(name) for name in distinct}
    return tuple(distinct if None in numbers.values() else sorted(distinct, key=lambda name: (numbers[name], name)))


def match_classes(ours: Sequence[str], theirs: Sequence[str]) -> tuple[list[int], str] | None:
    """Return the class of a model that each label names, and by what they are matched; None if they are not.

    By name, where need be without regard to case, or as numbers ("1.0" and "1"). Where the model only numbers its
    classes ("LABEL_0"), or the labels are whole numbers and the model's names are not: by order, where there are as
    many of both; otherwise whole numbers are indices, where it is certain that they are.

    Args:
        ours: names of the labels, each once.
        theirs: names of all classes of the model.
    """
    ways: tuple[tuple[str, Callable[[str], Any]], ...] = (
        ("by name", str),
        ("by name, without regard to case", str.casefold),
        ("as numbers", as_number),
    )
    for reason, key in ways:
        places = {key(name): index for index, name in enumerate(theirs)}
        keys = [key(name) for name in ours]
        if len(places) == len(theirs) and len(set(keys)) == len(ours) and None not in keys and set(keys) <= set(places):
            return [places[each] for each in keys], reason
    numbered = all(_NUMBERED.fullmatch(name.casefold()) for name in theirs)
    if not numbered and (not are_whole(ours) or any(as_number(name) is not None for name in theirs)):
        return None
    ranked = sorted_names(ours) if are_whole(ours) else tuple(ours)
    if len(ours) == len(theirs):
        pairs = ", ".join(f"{name!r} is {other!r}" for name, other in zip(ranked, theirs, strict=True))
        return [ranked.index(name) for name in ours], f"by order: {pairs}"
    indices = {name: int(as_number(name) or 0) for name in ours} if are_whole(ours) else {}
    counted = numbered or 0 in indices.values()  # from 1, labels would be others
    if not indices or not counted or not set(indices.values()) <= set(range(len(theirs))):
        return None
    return [indices[name] for name in ours], "by index"
