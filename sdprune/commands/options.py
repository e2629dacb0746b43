"""Options of the command line, made from the fields of the configurations."""

from __future__ import annotations

import dataclasses
import inspect
import re
import typing
from typing import Any

from sdprune.config import SDPruneConfig
from sdprune.recipe import DataConfig, StagesConfig, TrainingConfig

ABSENT: Any = object()


PARTS: dict[str, type[Any]] = {
    "data": DataConfig,
    "training": TrainingConfig,
    "pruning": SDPruneConfig,
    "pipeline": StagesConfig,
}


def option_names() -> tuple[str, ...]:
    return tuple(name for kind in PARTS.values() for name in kind.field_names())


def add_fields(parser: Any, kind: Any) -> None:
    """Add an option for every field; its help is the field's line in the docstring."""
    texts = _field_texts(kind)
    hints = typing.get_type_hints(kind)
    for item in dataclasses.fields(kind):
        parser.add_argument(
            f"--{item.name.replace('_', '-')}",
            type=lambda text, hint=hints[item.name]: _parsed(text, hint),
            default=ABSENT,
            metavar="VALUE",
            help=f"{texts[item.name]} (default: {item.default})".replace("%", "%%"),
        )


def _field_texts(kind: type) -> dict[str, str]:
    section = (inspect.getdoc(kind) or "").split("Args:\n")[1].split("\n\n")[0]
    entries = re.split(r"\n(?=    \w+:)", section)
    pairs = (entry.strip().split(":", 1) for entry in entries)
    return {name: " ".join(text.split()).rstrip(".") for name, text in pairs}


def _parsed(text: str, hint: Any) -> Any:
    """Turn the text of an option into the type of its field; the dataclass checks the rest."""
    import yaml

    kinds = typing.get_args(hint) or (hint,)
    if type(None) in kinds and text.lower() in ("none", "null"):
        return None
    if pair := re.fullmatch(r"(\d+)[x,](\d+)", text):
        return int(pair[1]), int(pair[2])
    if str in kinds and not text.startswith(("[", "{")):
        return text
    try:
        return yaml.safe_load(text)
    except yaml.YAMLError:
        raise ValueError(f"{text!r} is not a value") from None
