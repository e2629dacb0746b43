"""The pipelines that a recipe can name: each trains on a workbench and tells what came out."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from torch import nn
from transformers import TrainerCallback, TrainingArguments

from sdprune.config import SDPruneConfig
from sdprune.recipe import Recipe
from sdprune.runs.classifier import align_labels, load_classifier
from sdprune.runs.prune import prune
from sdprune.runs.prune_then_distill import prune_then_distill
from sdprune.runs.quantized import pqk, prune_quantize_distill, run_quantized
from sdprune.runs.stages import without_pruning, without_teacher
from sdprune.runs.workbench import Workbench
from sdprune.training.arguments import training_arguments


@dataclass(frozen=True)
class Outcome:
    """A model that came out of a pipeline.

    Args:
        name: what it is, where the configuration does not say it; "" otherwise.
        model: dense layers with their zeros in place.
        config: how it was pruned and taught.
        folder: folder of its training, with its log.
        int8: the same model with int8 layers, or None.
    """

    name: str
    model: nn.Module
    config: SDPruneConfig
    folder: Path
    int8: nn.Module | None = None


@dataclass(frozen=True)
class _Job:
    """What a pipeline is asked to do: a recipe on the model of a workbench, with arguments of `prune`."""

    workbench: Workbench
    recipe: Recipe
    args: TrainingArguments
    callbacks: list[TrainerCallback]

    @property
    def inputs(self) -> dict[str, Any]:
        workbench = self.workbench
        return {
            "model": workbench.classifier.model,
            "config": self.recipe.pruning,
            "train_dataset": workbench.train,
            "eval_dataset": workbench.validation,
            "args": self.args,
            "processing_class": workbench.classifier.tokenizer,
            "data_collator": workbench.collator,
            "compute_metrics": workbench.compute_metrics,
            "callbacks": self.callbacks,
        }

    @property
    def retraining_args(self) -> TrainingArguments:
        """Of the trainings after the pruning: the learning rate is not restarted any more."""
        training, stages = self.recipe.training, self.recipe.stages
        changes: dict[str, Any] = {}
        if stages.retraining_steps is not None:
            changes["max_steps"] = stages.retraining_steps
        if stages.retraining_learning_rate is not None:
            changes["learning_rate"] = stages.retraining_learning_rate
        if training.lr_scheduler_type == "cosine_with_restarts":
            changes |= {"lr_scheduler_type": "cosine", "lr_cycles": 1}
        folder, seed = Path(str(self.args.output_dir)), self.recipe.pruning.seed
        return training_arguments(replace(training, **changes), folder, seed=seed)


def carry_out(
    workbench: Workbench, recipe: Recipe, folder: Path, callbacks: Iterable[TrainerCallback] = (), **arguments: Any
) -> list[Outcome]:
    """Run the pipeline of a recipe on the model and the training rows of the workbench.

    Args:
        workbench: model and data.
        recipe: what is done.
        folder: for everything that the trainings write.
        callbacks: more callbacks, for every training.
        **arguments: more arguments of `training_arguments`.

    Returns:
        The models that came out, the final one last.
    """
    model: Any = workbench.classifier.model
    model.get_input_embeddings().requires_grad_(not recipe.training.freeze_embeddings)
    args = training_arguments(recipe.training, folder, seed=recipe.pruning.seed, **arguments)
    return PIPELINES[recipe.stages.pipeline](_Job(workbench, recipe, args, list(callbacks)))


def _prune(job: _Job) -> list[Outcome]:
    result = prune(**job.inputs, teacher_model=_teacher(job.workbench, job.recipe))
    return [Outcome("", result.model, job.recipe.pruning, result.output_dir)]


def _teacher(workbench: Workbench, recipe: Recipe) -> nn.Module | None:
    """Return the other teacher that the recipe names, or None.

    Raises:
        ValueError: nothing is distilled, the teacher has no trained head, or other classes or in another order.
    """
    name, task = recipe.stages.teacher_model, workbench.task
    if name is None:
        return None
    if not recipe.pruning.distillation_weights:
        raise ValueError(f"teacher_model={name!r} teaches nothing: distillation is None")
    classifier = load_classifier(name, task, trust_remote_code=workbench.trust_remote_code, all_classes=True)
    if not classifier.trained_head:
        raise ValueError(f"teacher_model {name!r} has no trained classification head")
    theirs = align_labels(task, classifier.model).label_names
    if theirs != task.label_names:
        raise ValueError(
            f"teacher_model {name!r} has the classes {', '.join(theirs)}, the model {', '.join(task.label_names)}; "
            "both need the same ones in the same order"
        )
    return classifier.model


def _prune_then_distill(job: _Job) -> list[Outcome]:
    config, stages = job.recipe.pruning, job.recipe.stages
    result = prune_then_distill(
        **job.inputs,
        student_args=job.retraining_args,
        width_multiple=stages.student_width_multiple,
        initialization=stages.student_initialization,
    )
    pruned, dense = without_teacher(config), without_pruning(config)
    return [
        Outcome("pruned teacher", result.teacher, pruned, result.output_dir / "teacher"),
        Outcome("prune, then distil", result.model, dense, result.output_dir / "student"),
    ]


def _quantizing(name: str, pipeline: Callable[..., Any]) -> Callable[[_Job], list[Outcome]]:
    def run(job: _Job) -> list[Outcome]:
        result = run_quantized(pipeline, **job.inputs, retraining_args=job.retraining_args)
        return [Outcome(name, result.model, job.recipe.pruning, result.directory, result.int8)]

    return run


PIPELINES: dict[str, Callable[[_Job], list[Outcome]]] = {
    "prune": _prune,
    "prune_then_distill": _prune_then_distill,
    "pqk": _quantizing("PQK", pqk),
    "prune_quantize_distill": _quantizing("prune, quantize, distil", prune_quantize_distill),
}
