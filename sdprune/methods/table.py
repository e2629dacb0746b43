"""`Table`: methods by name. What is entered is there for every configuration, recipe and option."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, MutableMapping
from typing import Generic, TypeVar

Entry = TypeVar("Entry")


class Table(MutableMapping[str, Entry], Generic[Entry]):
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
        self._name, self._kind, self._reserved = name, kind, reserved
        self._entries: dict[str, Entry] = {}
        self.update(entries)

    def __setitem__(self, name: object, entry: object) -> None:
        where, kind = f"{self._name}[{name!r}]", self._kind.__name__
        if not isinstance(name, str):
            raise TypeError(f"{where}: a name must be a str, got {type(name).__name__}")
        if not re.fullmatch("[A-Za-z][A-Za-z0-9_:]*", name) or name in self._reserved:
            but = f", and none of {', '.join(map(repr, self._reserved))}" if self._reserved else ""
            raise ValueError(f"{where}: a name must be a letter, then letters, digits, '_' or ':'{but}, got {name!r}")
        if name in self._entries:
            raise ValueError(f"{where} is taken; choose a name other than {', '.join(map(repr, self._entries))}")
        if not isinstance(entry, self._kind):
            raise TypeError(f"{where} must be a {kind}, got {entry!r} ({type(entry).__name__})")
        self._entries[name] = entry

    def __getitem__(self, name: str) -> Entry:
        return self._entries[name]

    def __delitem__(self, name: str) -> None:
        del self._entries[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._entries)

    def __len__(self) -> int:
        return len(self._entries)


def check(entry: object, field: str, fine: bool, allowed: str) -> None:
    """Raise ValueError that says what is allowed for a field of an entry, unless it is fine."""
    if not fine:
        raise ValueError(f"{type(entry).__name__}: {field} must be {allowed}, got {getattr(entry, field)!r}")
