"""The model card of what a recipe made."""

import platform
from collections.abc import Mapping
from typing import Any

import torch

from sdprune.exports.card import ModelCard, Speed
from sdprune.recipe import Recipe
from sdprune.runs.predict import best_device
from sdprune.runs.workbench import BUNDLED_MODEL, Workbench

GLUE = "nyu-mll/glue"
GLUE_TASKS = ("cola", "sst2", "mrpc", "stsb", "qqp", "mnli", "qnli", "rte", "wnli")
BUNDLED_ID = "sentence-transformers/all-MiniLM-L6-v2"


def card_of(recipe: Recipe, workbench: Workbench, row: Mapping[str, Any], dense: Mapping[str, float]) -> ModelCard:
    """Gather a card.

    Args:
        recipe: what was carried out.
        workbench: the model and its data.
        row: of `runs` in `metrics.json`.
        dense: scores of the model before pruning.
    """
    task = workbench.task
    rows, tokens = next(iter(workbench.probe.values())).shape[:2]
    device = torch.cuda.get_device_name() if best_device().type == "cuda" else _processor(best_device().type)
    splits = f"{len(task.train)} training, {len(task.validation)} validation and {len(task.test)} test rows"
    return ModelCard(
        base_model=BUNDLED_ID if recipe.model == BUNDLED_MODEL else recipe.model,
        method=_method(recipe, row),
        data=f"{task.name}: {splits}",
        seed=recipe.pruning.seed,
        metrics={name: row[name] for name in task.metrics},
        dense_metrics={name: dense[name] for name in task.metrics},
        speeds=(Speed(row["speedup"], device, "float32", int(rows), int(tokens)),),
        recipe=recipe.to_dict(),
        task="token-classification" if task.tagged else "text-classification",
        dataset=GLUE if recipe.data.data in GLUE_TASKS else None,
    )


def _method(recipe: Recipe, row: Mapping[str, Any]) -> str:
    if not row["target_sparsity"]:
        return f"{row['method']}, not pruned"
    if recipe.stages.pipeline == "prune" and recipe.pruning.distillation_weights:
        return (
            f"self-distilled pruning ({row['method']}, {row['structure']}), "
            "https://arxiv.org/abs/2109.15014, as reconstructed in sdprune"
        )
    return f"pruning ({row['method']}, {row['structure']})"


def _processor(kind: str) -> str:
    return f"{kind} ({platform.processor() or platform.machine()}, {torch.get_num_threads()} threads)"
