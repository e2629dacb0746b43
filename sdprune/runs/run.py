"""`sdprune prune`: one recipe, from a fine-tuned model to a folder with everything that came of it.

recipe.yaml  sdprune_config.json  metrics.jsonl  checkpoint-N/     while it runs; in a sub-folder for each of several
                                                                   trainings (`sdprune/runs/stages.py`)
model/  metrics.json  report.html  *.png                           when it is done
"""

import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from accelerate.utils import broadcast_object_list
from transformers import set_seed

from sdprune.files import public_name
from sdprune.recipe import RECIPE_NAME, Recipe
from sdprune.runs.pipelines import Outcome, carry_out
from sdprune.runs.results import Results, method_name
from sdprune.runs.workbench import load_workbench
from sdprune.training.arguments import settled
from sdprune.training.folder import WriteAtStart, check_free, is_begun, recipe_of


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
    if resume:
        recipe_of(output)
    else:
        check_free(output, output=True)
    resume = resume and is_begun(output)  # killed before its first step: it begins again
    processes.wait_for_everyone()  # or one would write what another takes for an earlier run
    set_seed(recipe.pruning.seed)  # a head that the model lacks is made at random
    workbench = load_workbench(
        recipe.model,
        recipe.data,
        cache,
        recipe.training.per_device_eval_batch_size,
        trust_remote_code=recipe.files.trust_remote_code,
    )
    config, classifier = recipe.pruning, workbench.classifier
    if not classifier.trained_head and (config.target_sparsity > 0.0 or config.distillation_weights):
        raise ValueError(
            f"model {recipe.model!r} has no trained classification head; fine-tune it first with "
            "--target-sparsity 0 --distillation none, then prune the model/ folder which that leaves"
        )
    # what was measured once holds for the whole run, also after an interruption, and for every process
    (training,) = broadcast_object_list([settled(recipe.training)])
    recipe = replace(recipe, training=training)
    dense_scores, languages = {}, {}
    if processes.is_main_process:
        logits = workbench.predict(classifier.model, "testing the dense model")
        dense_scores, languages = workbench.score(logits), workbench.score_languages(logits)
    callbacks = [WriteAtStart(output / RECIPE_NAME, recipe.to_yaml())]
    outcomes = carry_out(workbench, recipe, output, callbacks, resume=resume)
    metrics = {}
    if processes.is_main_process:
        results = Results(workbench, workbench.renewed().classifier.model, dense_scores)
        results.metrics["trained_head"] = classifier.trained_head
        if languages:
            results.metrics["dense_languages"] = languages
        _gather(outcomes, recipe, results, output)
        model, data = public_name(recipe.model), public_name(workbench.task.name)
        metrics = results.write(output, title=f"{model} pruned on {data}")
    processes.wait_for_everyone()
    return metrics


def _gather(outcomes: list[Outcome], recipe: Recipe, results: Results, output: Path) -> None:
    """Export and score what came out; the final model goes into `output` itself."""
    for outcome in outcomes:
        folder = outcome.folder / "model"
        if outcome is outcomes[-1]:
            folder = output / "model"
            shutil.rmtree(folder, ignore_errors=True)  # of a run that was interrupted after its training
        name = outcome.name or method_name(recipe.pruning)
        found = results.add(outcome.model, outcome.config, recipe, folder, name=name)
        if outcome.int8 is not None:
            logits = results.workbench.predict(outcome.int8, "testing int8", languages=False)
            found.row["int8"] = results.workbench.score(logits)
        results.record(name, outcome.folder, outcome.config, found.sparsity)
