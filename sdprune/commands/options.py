"""Options of the command line, made from the fields of the configurations."""

import argparse
import ast
import dataclasses
import inspect
import re
import typing
from typing import Any

from sdprune.recipe import FilesConfig


def add_fields(parser: Any, kind: Any) -> None:
    """Add an option for every field, absent by default; its help is the field's line in the docstring."""
    texts, hints = _field_texts(kind), typing.get_type_hints(kind)
    for item in dataclasses.fields(kind):
        alone: dict[str, Any] = {"nargs": "?", "const": True} if hints[item.name] is bool else {}  # a bare --flag
        parser.add_argument(
            f"--{item.name.replace('_', '-')}",
            **alone,
            type=lambda text, hint=hints[item.name]: _parsed(text, hint),
            default=argparse.SUPPRESS,
            metavar="VALUE",
            help=f"{texts[item.name]} (default: {item.default})".replace("%", "%%"),
        )


def add_trust(parser: Any) -> None:
    """Add the option that lets the code of a model run, to commands that do not have it among their fields."""
    parser.add_argument("--trust-remote-code", action="store_true", help=_field_texts(FilesConfig)["trust_remote_code"])


def given_fields(options: argparse.Namespace, *kinds: Any) -> dict[str, Any]:
    """Return those options that are fields of `kinds`: the ones that the command line names."""
    names = {name for kind in kinds for name in kind.field_names()}
    return {name: value for name, value in vars(options).items() if name in names}


def parse_pair(text: str) -> tuple[int, int] | None:
    """Read "32x32" or "32,32"; None if `text` is neither."""
    sides = re.fullmatch(r"(\d+)[x,](\d+)", text)
    return (int(sides[1]), int(sides[2])) if sides else None


def _field_texts(kind: type) -> dict[str, str]:
    """Return the entries of the docstring's sections, from the source where python -OO dropped the docstring."""
    text = inspect.getdoc(kind) or ""
    if "Args:\n" not in text:
        (node,) = ast.parse(inspect.getsource(kind)).body
        text = ast.get_docstring(node) or ""  # type: ignore[arg-type]
    entries = re.findall(r"^    (\w+): (.*(?:\n {5,}.*)*)", text, re.MULTILINE)
    return {name: " ".join(entry.split()).rstrip(".") for name, entry in entries}


def _parsed(text: str, hint: Any) -> Any:
    """Turn the text of an option into the type of its field; the dataclass checks the rest."""
    import yaml

    kinds = typing.get_args(hint) or (hint,)
    if type(None) in kinds and text.lower() in ("none", "null"):
        return None
    if pair := parse_pair(text):
        return pair
    if str in kinds and not text.startswith(("[", "{")):
        return text
    try:
        return yaml.safe_load(text)
    except yaml.YAMLError:
        raise argparse.ArgumentTypeError(f"invalid value {text!r}") from None
