"""The config.json of a model, read so that a damaged field is wrong input that names its file."""

from __future__ import annotations

from pathlib import Path
from typing import Any


def read_config(name: str | Path) -> Any:
    """Read the configuration of a model as `transformers.AutoConfig.from_pretrained` does.

    Args:
        name: a folder, its config.json, or a name on the hub.

    Raises:
        ValueError: a field has a value of another type than its model allows; the message names file and field.
        OSError: there is no such file.
    """
    from huggingface_hub.errors import StrictDataclassError
    from transformers import AutoConfig

    file = Path(name) / "config.json" if Path(name).is_dir() else name
    try:
        config = AutoConfig.from_pretrained(name)
    except StrictDataclassError as error:  # no ValueError of its own
        raise ValueError(f"{file}: {' '.join(str(error).split())}") from None
    architectures = config.architectures
    if not (architectures is None or _is_list_of_strings(architectures)):  # newer transformers no longer look at it
        raise ValueError(f"{file}: architectures must be a list of class names, got {architectures!r}")
    return config


def _is_list_of_strings(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(item, str) for item in value)
