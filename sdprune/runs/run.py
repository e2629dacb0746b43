"""`sdprune prune`: one recipe, from a fine-tuned model to a folder with everything that came of it.

recipe.yaml  sdprune_config.json  metrics.jsonl  checkpoint-N/     while it runs; in a sub-folder for each of several
                                                                   trainings (`sdprune/runs/stages.py`)
model/  metrics.json  report.html  *.png                           when it is done
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from accelerate.utils import broadcast_object_list
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments, set_seed

from sdprune.analysis.report import RunRecord, write_report
from sdprune.config import CONFIG_NAME, SDPruneConfig
from sdprune.exports.card import write_model_card
from sdprune.files import write_text
from sdprune.masking.pruner import Sparsity
from sdprune.masking.schedule import pruning_moments
from sdprune.recipe import RECIPE_NAME, Recipe, TrainingConfig
from sdprune.runs.card import card_of
from sdprune.runs.pipelines import Outcome, carry_out
from sdprune.runs.prune import PruneResult, prune
from sdprune.runs.results import assess, method_name, take_snapshot
from sdprune.runs.stages import SETTINGS_NAME
from sdprune.runs.workbench import Workbench, load_workbench
from sdprune.training.arguments import bf16_pays, training_arguments
from sdprune.training.progress import METRICS_NAME

SCORES_NAME = "metrics.json"


class _SaveRecipe(TrainerCallback):
    """Writes the recipe when the training begins, so that a refused run leaves the folder free."""

    def __init__(self, recipe: Recipe, path: Path) -> None:
        self.recipe, self.path = recipe, path

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if state.is_world_process_zero:
            self.recipe.save(self.path)


def run(recipe: Recipe, output: Path, *, resume: bool = False, cache: Path | None = None) -> dict[str, Any]:
    """Carry out a recipe and return what `metrics.json` holds.

    Processes that `torchrun` or `accelerate launch` started train together; the first one alone tests and writes.

    Args:
        recipe: model, data, training and pruning.
        output: a new folder, or with `resume` that of an interrupted run.
        resume: go on from the newest whole checkpoint.
        cache: where fetched samples are kept; None: the user's cache folder.

    Returns:
        The scores; of several processes, the first one gets them and the others an empty mapping.

    Raises:
        ValueError: wrong input; nothing is written.
        TrainingInterrupted: Ctrl-C; a checkpoint was saved.
    """
    processes = PartialState(cpu=not torch.accelerator.is_available())
    if (output / SCORES_NAME).exists() and resume:
        raise ValueError(f"the run in {str(output)!r} is finished; its scores are in {SCORES_NAME}")
    if not resume:
        check_free(output)
    # killed before its first step: it begins again
    resume = resume and ((output / CONFIG_NAME).exists() or (output / SETTINGS_NAME).exists())
    processes.wait_for_everyone()  # or one would write what another takes for an earlier run
    set_seed(recipe.pruning.seed)  # a head that the model lacks is made at random
    workbench = load_workbench(recipe.model, recipe.data, cache, recipe.training.per_device_eval_batch_size)
    config, classifier = recipe.pruning, workbench.classifier
    if not classifier.trained_head and (config.target_sparsity > 0.0 or config.distillation_weights):
        raise ValueError(
            f"model {recipe.model!r} has no trained classification head; fine-tune it first with "
            "--target-sparsity 0 --distillation none, then prune the model/ folder which that leaves"
        )
    # what was measured once holds for the whole run, also after an interruption, and for every process
    (training,) = broadcast_object_list([settled(recipe.training)])
    recipe = replace(recipe, training=training)
    dense_scores = {}
    if processes.is_main_process:
        dense_scores = workbench.score(workbench.predict_test(classifier.model, "testing the dense model"))
    callbacks = [_SaveRecipe(recipe, output / RECIPE_NAME)]
    outcomes = carry_out(workbench, recipe, output, callbacks, resume=resume)
    metrics = {}
    if processes.is_main_process:
        metrics = _write_results(outcomes, recipe, workbench, dense_scores, output)
    processes.wait_for_everyone()
    return metrics


def _write_results(
    outcomes: list[Outcome], recipe: Recipe, workbench: Workbench, dense_scores: dict[str, float], output: Path
) -> dict[str, Any]:
    """Export and test what came out, and write the models, their cards, the scores and the report."""
    dense = workbench.renewed().classifier.model
    rows, records = [], []
    for outcome in outcomes:
        folder = output / "model" if outcome is outcomes[-1] else outcome.folder / "model"
        if outcome is outcomes[-1]:
            shutil.rmtree(folder, ignore_errors=True)  # of a run that was interrupted after its training
        snapshot = take_snapshot(outcome.model, outcome.config, folder, workbench)
        (assessment,) = assess([snapshot], dense, workbench)
        name = outcome.name or method_name(recipe.pruning)
        rows.append(assessment.row | {"method": name} | _int8_scores(outcome.int8, workbench))
        write_model_card(folder, card_of(recipe, workbench, rows[-1], dense_scores))
        records.append(read_record(name, outcome.folder, outcome.config, snapshot.sparsity))
    trained_head = workbench.classifier.trained_head
    metrics = {"dense": dense_scores, "trained_head": trained_head, "baselines": {}, "runs": rows}
    if workbench.task.zero_shot:
        metrics["dense_languages"] = workbench.score_languages(dense)
    write_text(output / SCORES_NAME, json.dumps(metrics, indent=2) + "\n")
    write_report(output, metrics, records, title=f"{recipe.model} pruned on {workbench.task.name}")
    return metrics


def _int8_scores(model: Any, workbench: Workbench) -> dict[str, Any]:
    if model is None:
        return {}
    return {"int8": workbench.score(workbench.predict_test(model, "testing int8"))}


def settled(training: TrainingConfig) -> TrainingConfig:
    """Return the training with `bf16` decided for the device at hand."""
    return replace(training, bf16=bf16_pays()) if training.bf16 is None else training


def prune_on(
    workbench: Workbench,
    recipe: Recipe,
    folder: Path,
    callbacks: Iterable[TrainerCallback] = (),
    **arguments: Any,
) -> PruneResult:
    """Prune the model of the workbench on its training rows; `arguments` go to `training_arguments`."""
    model: Any = workbench.classifier.model
    model.get_input_embeddings().requires_grad_(not recipe.training.freeze_embeddings)
    return prune(
        model,
        recipe.pruning,
        workbench.train,
        workbench.validation,
        args=training_arguments(recipe.training, folder, seed=recipe.pruning.seed, **arguments),
        processing_class=workbench.classifier.tokenizer,
        compute_metrics=workbench.compute_metrics,
        callbacks=callbacks,
    )


def check_free(output: Path) -> None:
    """Raise ValueError if `output` holds anything."""
    if (output / CONFIG_NAME).exists() or (output / SETTINGS_NAME).exists():
        raise ValueError(
            f"output {str(output)!r} already holds a run; name another folder, or go on with it: "
            f"sdprune prune --resume {output}"
        )
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise ValueError(f"output {str(output)!r} is not an empty folder; name another one or remove it")


def read_record(name: str, folder: Path, config: SDPruneConfig, sparsity: Sparsity) -> RunRecord:
    """Gather what the report shows of a run from its folder."""
    lines = (folder / METRICS_NAME).read_text(encoding="utf-8").splitlines()
    history = tuple(json.loads(line) for line in lines)
    steps = max((row["step"] for row in history), default=0)
    pruned = config.target_sparsity > 0.0
    return RunRecord(
        name=name,
        history=history,
        moments=pruning_moments(config, steps) if pruned else (),
        densities={layer: 1.0 - value for layer, value in sparsity.layers.items()} if pruned else {},
    )
