"""`Table`: methods by name. What is entered is there for every configuration, recipe and option."""

import re
from collections import UserDict
from collections.abc import Mapping
from typing import Any, Generic, TypeVar

Entry = TypeVar("Entry")
Options = Any  # the configuration, which stands behind this folder and looks into its tables


class Table(UserDict[str, Entry], Generic[Entry]):
    """Entries of one kind by name; a name stands for one entry until that is deleted.

    Args:
        name: how messages call the table.
        kind: the class of its entries.
        entries: what it holds at first.
        reserved: names that mean something else where entries are named.

    Raises:
        ValueError: at entry: a name that is taken, reserved, or not made of letters, digits, "_" and ":".
        TypeError: at entry: a name that is no text, or a value of another class.
    """

    def __init__(
        self, name: str, kind: type[Entry], entries: Mapping[str, Entry], reserved: tuple[str, ...] = ()
    ) -> None:
        self.name, self.kind, self.reserved = name, kind, reserved
        super().__init__(entries)

    def __setitem__(self, name: object, entry: object) -> None:
        where = f"{self.name}[{name!r}]"
        if not isinstance(name, str):
            raise TypeError(f"{where}: a name must be a str, got {type(name).__name__}")
        if not re.fullmatch("[A-Za-z][A-Za-z0-9_:]*", name) or name in self.reserved:
            but = f", and none of {', '.join(map(repr, self.reserved))}" if self.reserved else ""
            raise ValueError(f"{where}: a name must be a letter, then letters, digits, '_' or ':'{but}, got {name!r}")
        if name in self:
            raise ValueError(f"{where} is taken; choose a name other than {', '.join(map(repr, self))}")
        if not isinstance(entry, self.kind):
            raise TypeError(f"{where} must be a {self.kind.__name__}, got {entry!r} ({type(entry).__name__})")
        super().__setitem__(name, entry)


def check(entry: object, field: str, fine: bool, allowed: str) -> None:
    """Raise ValueError that says what is allowed for a field of an entry, unless it is fine."""
    if not fine:
        raise ValueError(f"{type(entry).__name__}: {field} must be {allowed}, got {getattr(entry, field)!r}")
