"""What every configuration shares: fields checked by type and choice, to and from plain values."""

import dataclasses
import difflib
import math
import types
import typing
from collections.abc import Iterable, Mapping
from typing import Any, Self


def unknown_key_message(key: str, allowed: Iterable[str]) -> str:
    """Say that `key` is no field, with the nearest field that is one."""
    allowed = sorted(allowed)
    near = difflib.get_close_matches(key, allowed, n=1)
    hint = f"; did you mean {near[0]!r}?" if near else ""
    return f"unknown key {key!r}{hint} Allowed: {', '.join(allowed)}"


def check_choice(name: str, value: Any, allowed: Iterable[str]) -> None:
    """Raise ValueError that names the nearest value allowed, if `value` is none of them."""
    allowed = tuple(allowed)
    if value not in allowed:
        near = difflib.get_close_matches(str(value), allowed, n=1)
        hint = f" (did you mean {near[0]!r}?)" if near else ""
        raise ValueError(f"{name} must be one of {', '.join(map(repr, allowed))}, got {value!r}{hint}")


class CheckedConfig:
    """Conversions and checks that every configuration below shares."""

    @classmethod
    def field_names(cls) -> tuple[str, ...]:
        """Return the names of the fields, in order."""
        return tuple(item.name for item in dataclasses.fields(cls))  # type: ignore[arg-type]

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Self:
        """Build from a mapping.

        Raises:
            ValueError: a key is no field (the nearest field is named) or a value is not allowed.
            TypeError: a value has the wrong type.
        """
        for key in values:
            if key not in cls.field_names():
                raise ValueError(unknown_key_message(key, cls.field_names()))
        return cls(**values)

    def to_dict(self) -> dict[str, Any]:
        """Return plain values that JSON and YAML hold without loss."""
        return {name: _plain(getattr(self, name)) for name in self.field_names()}

    def _check_types(self) -> None:
        hints = typing.get_type_hints(type(self))
        for name in self.field_names():
            value = _converted(getattr(self, name), hints[name])
            if not _matches(value, hints[name]):
                expected = getattr(hints[name], "__name__", None) or str(hints[name])
                raise TypeError(f"{name} must be {expected}, got {value!r} ({type(value).__name__})")
            object.__setattr__(self, name, value)

    def _check_choice(self, name: str, allowed: Iterable[str]) -> None:
        check_choice(name, getattr(self, name), allowed)

    def _check_numbers(self, *names: str, least: float | None = None, above: float = -math.inf) -> None:
        """Check that numbers are finite, at least `least`, and above `above`; None is left alone."""
        allowed = f"> {above}" if least is None else f">= {least}"
        for name in names:
            value = getattr(self, name)
            if value is not None and not (math.isfinite(value) and value > above and (least is None or value >= least)):
                raise ValueError(f"{name} must be a finite number {allowed}, got {value!r}")


def _plain(value: Any) -> Any:
    if isinstance(value, tuple):
        return list(value)
    return dict(value) if isinstance(value, Mapping) else value


def _converted(value: Any, hint: Any) -> Any:
    """Turn what JSON and YAML give (lists, whole numbers for floats) into the field's own type."""
    options = typing.get_args(hint) if isinstance(hint, types.UnionType) else (hint,)
    if isinstance(value, list) and any(typing.get_origin(option) is tuple for option in options):
        return tuple(value)
    if float in options and int not in options and str not in options and type(value) in (int, str):
        try:
            return float(value)  # YAML 1.1 reads 1e-4 as text
        except ValueError:
            return value
    if isinstance(value, Mapping):
        return {key: _converted(item, float) for key, item in value.items()}
    return value


def _matches(value: Any, hint: Any) -> bool:
    if isinstance(hint, types.UnionType):
        return any(_matches(value, option) for option in typing.get_args(hint))
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin is tuple:
        if not isinstance(value, tuple):
            return False
        if arguments[-1] is Ellipsis:
            return all(_matches(item, arguments[0]) for item in value)
        return len(value) == len(arguments) and all(map(_matches, value, arguments))
    if origin is not None:  # Mapping[str, float]
        return isinstance(value, Mapping) and all(
            _matches(key, arguments[0]) and _matches(item, arguments[1]) for key, item in value.items()
        )
    # bool is an int to isinstance, never here
    return type(value) is hint if hint in (int, float, bool) else isinstance(value, hint)
