"""What a run began with: the model, the rows and the training, so that nobody goes on with others by mistake."""

import hashlib
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from transformers import TrainingArguments

from sdprune.training.checks import has_rows

SAMPLED_ROWS, SAMPLED_VALUES = 256, 4096

# what decides the weights at the end; how often a run logs, saves and evaluates may change
TRAINING_FIELDS = (
    "max_steps",
    "num_train_epochs",
    "per_device_train_batch_size",
    "gradient_accumulation_steps",
    "learning_rate",
    "lr_scheduler_type",
    "lr_scheduler_kwargs",
    "warmup_steps",
    "weight_decay",
    "max_grad_norm",
    "optim",
    "optim_args",
    "adam_beta1",
    "adam_beta2",
    "adam_epsilon",
    "label_smoothing_factor",
    "train_sampling_strategy",
    "seed",
    "data_seed",
    "bf16",
    "fp16",
)


def run_origin(
    model: nn.Module, teacher: nn.Module | None, train_dataset: Any, args: TrainingArguments
) -> dict[str, Any]:
    """Return plain values that tell one run from another, before anything of the model is masked.

    Args:
        model: the model as it is given.
        teacher: another teacher than the model's copy, or None.
        train_dataset: as of `transformers.Trainer`.
        args: as of `transformers.Trainer`.
    """
    values = args.to_dict()  # type: ignore[no-untyped-call]
    training = {name: values.get(name) for name in TRAINING_FIELDS} | {"world_size": args.world_size}
    return {
        "model": model_fingerprint(model),
        "teacher": None if teacher is None else model_fingerprint(teacher),
        "data": rows_fingerprint(train_dataset),
        "training": training,
    }


@torch.no_grad()
def model_fingerprint(model: nn.Module) -> dict[str, Any]:
    """Return the class of a model, its count of parameters, and a digest of names, shapes and sampled values."""
    digest = hashlib.sha256()
    for name, value in model.state_dict().items():
        flat = value.detach().reshape(-1)
        chosen = flat[:: max(1, flat.numel() // SAMPLED_VALUES)]
        _feed(digest, (name, tuple(value.shape), chosen))
    count = sum(parameter.numel() for parameter in model.parameters())
    return {"class": type(model).__name__, "parameters": count, "digest": digest.hexdigest()[:16]}


def rows_fingerprint(dataset: Any) -> dict[str, Any]:
    """Return the number of rows of a data set, its columns, and a digest of up to `SAMPLED_ROWS` rows spread over it.

    What cannot be known stays None: all three of a stream, the digest of rows that come out differently each time.
    """
    if not has_rows(dataset):
        return {"rows": None, "columns": None, "digest": None}
    count = len(dataset)
    places = sorted({index * count // SAMPLED_ROWS for index in range(SAMPLED_ROWS)} | {count - 1}) if count else []
    first, second = (_rows_digest(dataset, places) for _ in range(2))
    row = dataset[0] if count else {}
    columns = sorted(map(str, row)) if isinstance(row, Mapping) else None
    return {"rows": count, "columns": columns, "digest": first if first == second else None}


def differences(earlier: Mapping[str, Any], now: Mapping[str, Any], prefix: str = "") -> list[str]:
    """Return "name: earlier -> now" of every value that differs, nested names joined by dots."""
    found = []
    for name in dict.fromkeys([*earlier, *now]):
        before, after = earlier.get(name), now.get(name)
        if isinstance(before, Mapping) and isinstance(after, Mapping):
            found += differences(before, after, f"{prefix}{name}.")
        elif before != after:
            found.append(f"{prefix}{name}: {before!r} -> {after!r}")
    return found


def _rows_digest(dataset: Any, places: list[int]) -> str:
    digest = hashlib.sha256()
    for place in places:
        _feed(digest, dataset[place])
    return digest.hexdigest()[:16]


def _feed(digest: Any, value: Any) -> None:
    """Add a value and its type; of objects that are no data the type alone (their text may hold an address)."""
    digest.update(type(value).__name__.encode() + b"\0")
    if isinstance(value, Mapping):
        for key in sorted(value, key=str):
            _feed(digest, (str(key), value[key]))
    elif isinstance(value, list | tuple):
        digest.update(str(len(value)).encode() + b"\0")
        if value and all(type(item) is int for item in value):  # token ids: one update instead of hundreds
            digest.update(repr(value).encode())
        else:
            for item in value:
                _feed(digest, item)
    elif isinstance(value, Tensor):
        digest.update(f"{tuple(value.shape)} {value.dtype}".encode())
        digest.update(value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    elif isinstance(value, np.ndarray):
        digest.update(f"{value.shape} {value.dtype}".encode() + value.tobytes())
    elif isinstance(value, str | bytes | int | float | bool | np.generic) or value is None:
        digest.update(repr(value).encode() + b"\0")
