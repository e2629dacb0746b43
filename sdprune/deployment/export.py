"""Export: a pruned model as files that plain transformers loads."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sdprune.config import SDPruneConfig
from sdprune.files import new_directory, write_text
from sdprune.masking.pruner import masked_fraction, measure_sparsity
from sdprune.masking.select import select_linears
from sdprune.masking.swap import masked_layers

FORMATS = ("plain",)


def export(
    model: Any,
    directory: str | Path,
    format: str = "plain",
    *,
    config: SDPruneConfig | None = None,
    processing_class: Any = None,
) -> Path:
    """Write a pruned model into a new folder; the folder is whole or absent, and the model stays as it is.

    "plain": dense safetensors with exact zeros and a `sdprune` section in config.json that tells the sparsity of
    every layer. `AutoModel*.from_pretrained(directory)` loads it, with or without this package, to the same
    logits. Its zeros take as much space and time as other numbers.

    Args:
        model: a transformers model, with masked layers or with zeros in dense ones.
        directory: the folder to make.
        format: "plain".
        config: how the model was pruned, for the record; None: not recorded.
        processing_class: tokenizer to save beside the model.

    Returns:
        The folder.

    Raises:
        ValueError: an unknown format, or a folder that exists and is not empty.
        TypeError: `model` is no transformers model.
    """
    if format not in FORMATS:
        raise ValueError(f"format must be one of {', '.join(map(repr, FORMATS))}, got {format!r}")
    if not (hasattr(model, "save_pretrained") and hasattr(model, "config")):
        raise TypeError(f"model must be a transformers model, got {type(model).__name__}")
    section = {"version": 1, "format": format, "layers": _layer_sparsity(model, config)}
    if config is not None:
        section["pruning"] = config.to_dict()
    with new_directory(Path(directory)) as folder:
        model.save_pretrained(folder, state_dict=dense_state_dict(model))
        path = folder / "config.json"
        values = json.loads(path.read_text(encoding="utf-8")) | {"sdprune": section}
        write_text(path, json.dumps(values, indent=2, sort_keys=True) + "\n")
        if processing_class is not None:
            processing_class.save_pretrained(folder)
    return Path(directory)


@torch.no_grad()
def dense_state_dict(model: torch.nn.Module) -> dict[str, Tensor]:
    """Return the state of the model as if its masked layers were dense: zeros in the weights, no masks."""
    state = dict(model.state_dict())
    for name, layer in masked_layers(model).items():
        del state[f"{name}.mask"]
        weight = state[f"{name}.weight"]
        state[f"{name}.weight"] = weight.masked_fill(~layer.bit_mask.to_bool(), 0.0)
    return state


def _layer_sparsity(model: torch.nn.Module, config: SDPruneConfig | None) -> dict[str, float]:
    if masked_fraction(model) > 0.0:
        return {name: layer.sparsity for name, layer in masked_layers(model).items()}
    return measure_sparsity(model, select_linears(model, config or SDPruneConfig())).layers
