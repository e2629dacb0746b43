"""Prune the teacher, then distil it into a smaller dense student of the same architecture."""

import copy
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn
from transformers import SchedulerType, TrainingArguments, set_seed

from sdprune.config import SDPruneConfig
from sdprune.config_base import check_choice
from sdprune.masking.pruner import Sparsity, measure_sparsity
from sdprune.masking.select import select_linears
from sdprune.recipe import INITIALIZATIONS
from sdprune.runs.stages import Stages, without_pruning, without_teacher
from sdprune.runs.student import anatomy, make_student, student_config
from sdprune.training.checks import check_objectives

STEPS = 4
PRUNE_THEN_DISTILL = SDPruneConfig(
    target_sparsity=1.0 - 0.8**STEPS,
    scope="global",
    schedule="geometric",
    pruning_steps=STEPS,
    end_ratio=1.0 - 1.0 / STEPS,
    distillation="kl",
    task_weight=0.05,
    distillation_weight=0.95,
    temperature=10.0,
)
"""A fifth of the remaining weights in each of four steps; then 0.05 of the task loss and 0.95 of KL."""


@dataclass(frozen=True)
class PruneThenDistillResult:
    """What `prune_then_distill` returns.

    Args:
        model: the student: a dense model of the teacher's architecture with narrower layers.
        teacher: the pruned teacher, dense layers with their zeros in place.
        metrics: the student's scores on the evaluation data; empty without such data.
        teacher_metrics: the pruned teacher's.
        sparsity: the zeros of the teacher.
        output_dir: folder with `teacher/` and `student/`, each with its checkpoints, log and `model/`.
    """

    model: nn.Module
    teacher: nn.Module
    metrics: dict[str, float]
    teacher_metrics: dict[str, float]
    sparsity: Sparsity
    output_dir: Path


def prune_then_distill(
    model: Any,
    config: SDPruneConfig = PRUNE_THEN_DISTILL,
    train_dataset: Any = None,
    eval_dataset: Any = None,
    *,
    args: TrainingArguments | None = None,
    student_args: TrainingArguments | None = None,
    width_multiple: int = 64,
    initialization: str = "random",
    **inputs: Any,
) -> PruneThenDistillResult:
    """Prune a teacher, then distil it into a dense student whose widths match what the pruning left.

    Park and No 2021 (https://arxiv.org/abs/2109.14960): the teacher is pruned by global magnitude, with the
    learning rate restarted after every step; the student starts from random weights and learns
    (1 - alpha) * task + alpha * temperature**2 * KL with alpha 0.95 and temperature 10. How widths follow densities
    in a Transformer is a reconstruction: see `student_config`.

    Args:
        model: a fine-tuned transformers encoder; pruned in place, it becomes the teacher.
        config: how the teacher is pruned; the distillation fields and `task_weight` say how the student learns, and
            play no part in the pruning.
        train_dataset: as of `transformers.Trainer`.
        eval_dataset: as of `transformers.Trainer`.
        args: as of `transformers.Trainer`, for the pruning; None: three epochs into `sdprune_output`, with the
            learning rate restarted at each pruning step. With `resume_from_checkpoint` an interrupted run goes on,
            in whichever stage it was.
        student_args: for the student; None: as `args`, but with a linear decay of the learning rate. Its folder is
            not used.
        width_multiple: the student's feed-forward width is a multiple of this.
        initialization: "random", or "largest": from the teacher's largest rows.
        **inputs: `processing_class`, `data_collator`, `compute_metrics`, `callbacks` for both stages, as of `prune`.

    Returns:
        The student, the pruned teacher, their scores and the teacher's sparsity.

    Raises:
        ValueError: before any training: `config` distils nothing, the architecture has no single feed-forward
            width, an argument is not allowed, or the folder holds another run.
        TrainingInterrupted: Ctrl-C; the step was finished and a checkpoint saved.
    """
    names = select_linears(model, config)
    parts = anatomy(model, names)
    _check(model, config, parts.width, width_multiple, initialization)
    if args is None:
        args = TrainingArguments(
            output_dir="sdprune_output",
            seed=config.seed,
            report_to="none",
            lr_scheduler_type="cosine_with_restarts",
            lr_scheduler_kwargs={"num_cycles": config.pruning_steps},
        )
    directory = Path(str(args.output_dir))
    settings = {**config.to_dict(), "width_multiple": width_multiple, "initialization": initialization}
    stages = Stages(directory, settings, resume=bool(args.resume_from_checkpoint))
    inputs |= {"train_dataset": train_dataset, "eval_dataset": eval_dataset}
    inputs["callbacks"] = list(inputs.get("callbacks") or ())  # for both stages
    taught = stages.run("teacher", model, without_teacher(config), args=args, **inputs)
    teacher: Any = taught.model
    set_seed(config.seed)  # the student's first weights, the same after an interruption
    shape = student_config(teacher, parts, width_multiple=width_multiple)
    student = make_student(teacher, parts, shape, initialization=initialization)
    own_args = student_args or _without_restarts(args)
    learned = stages.run("student", student, without_pruning(config), args=own_args, teacher_model=teacher, **inputs)
    sparsity = measure_sparsity(teacher, names)
    return PruneThenDistillResult(learned.model, teacher, learned.metrics, taught.metrics, sparsity, directory)


def _without_restarts(args: TrainingArguments) -> TrainingArguments:
    student = copy.copy(args)
    student.lr_scheduler_type, student.lr_scheduler_kwargs = SchedulerType.LINEAR, None
    return student


def _check(model: Any, config: SDPruneConfig, width: int, width_multiple: int, initialization: str) -> None:
    """Refuse before the first stage what the second one would refuse."""
    if not config.distillation_weights:
        raise ValueError("distillation is None, but the student learns by it; choose 'kl' or another objective")
    check_objectives(model, config, masked=False)
    if not 1 <= width_multiple <= width:
        raise ValueError(
            f"width_multiple must lie between 1 and the teacher's feed-forward width {width}, got {width_multiple}"
        )
    check_choice("initialization", initialization, INITIALIZATIONS)
