"""Exported snapshots of a run, and what they are worth on the test rows."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from transformers import AutoModelForSequenceClassification, AutoModelForTokenClassification

from sdprune.config import SDPruneConfig, split_term
from sdprune.deployment.export import dense_state_dict, export
from sdprune.deployment.reload import reload_differences
from sdprune.masking.pruner import Sparsity, measure_sparsity
from sdprune.masking.select import select_linears
from sdprune.methods.objectives import OBJECTIVES
from sdprune.pipelines.evaluate import best_device, speedup
from sdprune.pipelines.workbench import Workbench


def method_name(config: SDPruneConfig) -> str:
    """Name a configuration as the literature does: "SDP-CC", "SDP-CC + SDP-KLD", "movement + SDP-KLD", or "magnitude"
    alone. What prunes nothing is "fine-tuned", or "distilled" by its objectives. A representation that an objective
    names itself follows it: "SDP-CC + MSE (logits)".
    """
    objectives = " + ".join(_term_name(term) for term in config.distillation_weights)
    if config.target_sparsity == 0.0:
        return f"distilled, {objectives}" if objectives else "fine-tuned"
    if objectives and config.criterion == SDPruneConfig.criterion:
        return objectives
    return f"{config.criterion} + {objectives}" if objectives else config.criterion


def _term_name(term: str) -> str:
    objective, feature = split_term(term)
    return (OBJECTIVES[objective].label or objective) + (f" ({feature.replace('@', ' of layer ')})" if feature else "")


@dataclass(frozen=True)
class Snapshot:
    """A pruned model as it was exported.

    Args:
        config: how it is pruned, with the sparsity it has reached as its target.
        folder: the exported files.
        sparsity: zeros counted in the weights.
        logits: fp32 logits of the model in memory on the probe batch.
    """

    config: SDPruneConfig
    folder: Path
    sparsity: Sparsity
    logits: Tensor


@torch.inference_mode()
def take_snapshot(model: Any, config: SDPruneConfig, folder: Path, workbench: Workbench) -> Snapshot:
    """Export a model, masked or dense, that may be in the middle of its training; it stays as it is.

    A folder that exists is taken for that model's export.
    """
    if not folder.exists():
        export(model, folder, config=config, processing_class=workbench.classifier.tokenizer)
    # A model under training may run in autocast; its dense copy runs in fp32, as a user would load it.
    dense = type(model)(copy.deepcopy(model.config))
    dense.load_state_dict(dense_state_dict(model))
    dense = dense.float().eval()
    sparsity = measure_sparsity(dense, select_linears(dense, config))
    return Snapshot(config, folder, sparsity, dense(**workbench.probe).logits)


@dataclass(frozen=True)
class Assessment:
    """What a snapshot is worth.

    Args:
        row: a row of `runs` in `metrics.json`.
        logits: on the test rows, of `predict`.
    """

    row: dict[str, Any]
    logits: NDArray[np.float32]


def assess(
    snapshots: Sequence[Snapshot], dense: torch.nn.Module, workbench: Workbench, *, bf16: bool = False
) -> list[Assessment]:
    """Load every snapshot from its files, score it on the test rows, time it beside the dense model, and check in
    a fresh process without this package that its logits are those it had in memory.
    """
    probe = workbench.probe
    differences = reload_differences(
        {str(item.folder): item.folder for item in snapshots},
        probe,
        {str(item.folder): item.logits for item in snapshots},
    )
    auto_class: Any = AutoModelForTokenClassification if workbench.task.tagged else AutoModelForSequenceClassification
    found = []
    for item in snapshots:
        model = auto_class.from_pretrained(item.folder, dtype=torch.float32)
        logits = workbench.predict_test(model, f"testing {item.folder.name}", bf16=bf16)
        row = {
            "method": method_name(item.config),
            "structure": item.config.structure,
            "target_sparsity": item.config.target_sparsity,
            "sparsity": item.sparsity.linear,
            "model_sparsity": item.sparsity.model,
            **workbench.score(logits),
            "reload_max_difference": differences[str(item.folder)],
            "speedup": speedup(dense, model, probe),
            "device": best_device().type,
        }
        if workbench.task.zero_shot:
            row["languages"] = workbench.score_languages(model, bf16=bf16)
        found.append(Assessment(row, logits))
    return found
