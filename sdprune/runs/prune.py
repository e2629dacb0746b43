"""`prune`: self-distilled pruning of one model, from a dense Transformer to one with exact zeros."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn
from transformers import PrinterCallback, ProgressCallback, TrainerCallback, TrainingArguments

from sdprune.config import CONFIG_NAME, SDPruneConfig
from sdprune.masking.pruner import Sparsity, measure_sparsity
from sdprune.masking.swap import masked_layers, unswap
from sdprune.training.callback import SDPruneCallback
from sdprune.training.checkpoint import (
    MARKER,
    MarkComplete,
    checkpoints,
    no_empty_folder,
    read_marker,
    remove_incomplete,
)
from sdprune.training.diagnostics import Diagnostics
from sdprune.training.origin import differences, run_origin
from sdprune.training.progress import ORIGIN_NAME, FinishStepOnInterrupt, ProgressBar, RunFolder
from sdprune.training.trainer import SDPruneTrainer

logger = logging.getLogger(__name__)

ORIGIN_PARTS = {
    "training": "other training arguments",
    "data": "another train_dataset",
    "model": "another model (build the dense one again, as it was before any masks and zeros)",
    "teacher": "another teacher_model",
}


@dataclass(frozen=True)
class PruneResult:
    """What `prune` returns.

    Args:
        model: the pruned model, ordinary dense layers with their zeros in place.
        teacher: the frozen unpruned model, or None without distillation.
        metrics: the scores on the evaluation data after the last step; empty without evaluation data.
        sparsity: the zeros, counted in the weights.
        output_dir: folder with the checkpoints, `metrics.jsonl` and `sdprune_config.json`.
    """

    model: nn.Module
    teacher: nn.Module | None
    metrics: dict[str, float]
    sparsity: Sparsity
    output_dir: Path


def prune(
    model: nn.Module,
    config: SDPruneConfig,
    train_dataset: Any,
    eval_dataset: Any = None,
    *,
    args: TrainingArguments | None = None,
    processing_class: Any = None,
    data_collator: Any = None,
    compute_metrics: Callable[[Any], dict[str, float]] | None = None,
    callbacks: Iterable[TrainerCallback] | None = None,
    teacher_model: nn.Module | None = None,
) -> PruneResult:
    """Prune a fine-tuned model gradually while a frozen, unpruned copy of it teaches it.

    Self-distilled pruning (O'Neill, Dutta and Assem 2021, https://arxiv.org/abs/2109.15014). The schedule, the
    loss weights and the representation are reconstructions; the paper's own settings were not available.

    Args:
        model: a fine-tuned transformers model; changed in place.
        config: what is pruned and distilled.
        train_dataset: as of `transformers.Trainer`.
        eval_dataset: as of `transformers.Trainer`.
        args: as of `transformers.Trainer`; None: three epochs into `sdprune_output`, seeded by `config.seed`. With
            `resume_from_checkpoint` (True or a folder) an interrupted run goes on: build the dense model again,
            call `prune` with the same arguments, and it ends with the weights of an uninterrupted run.
        processing_class: as of `transformers.Trainer`, usually the tokenizer.
        data_collator: as of `transformers.Trainer`.
        compute_metrics: as of `transformers.Trainer`.
        callbacks: more callbacks.
        teacher_model: another teacher than the model's own copy.

    Returns:
        The pruned model, its teacher, its scores and its sparsity.

    Raises:
        ValueError: the configuration does not fit the model or the training, or `output_dir` holds another run.
        TrainingInterrupted: Ctrl-C; the step was finished and a checkpoint saved.
    """
    if args is None:
        args = TrainingArguments(output_dir="sdprune_output", seed=config.seed, report_to="none")
    directory = Path(str(args.output_dir))
    bar, interrupt = ProgressBar("pruning" if config.target_sparsity else "training"), FinishStepOnInterrupt()
    origin = run_origin(model, teacher_model, train_dataset, args)
    resume = _claim(directory, config, origin, args)
    watchers = [MarkComplete({"config": config.to_dict()} | origin), RunFolder(directory, config, origin), interrupt]
    with no_empty_folder(directory):
        trainer = SDPruneTrainer(
            model,
            args,
            config=config,
            teacher_model=teacher_model,
            train_dataset=train_dataset,
            eval_dataset=eval_dataset,
            processing_class=processing_class,
            data_collator=data_collator,
            compute_metrics=compute_metrics,
            callbacks=[SDPruneCallback(config), *(callbacks or ()), *watchers],
        )
        if config.diagnostics_steps is not None:
            trainer.add_callback(Diagnostics(trainer))
        for standard in (ProgressCallback, PrinterCallback):
            trainer.remove_callback(standard)
        if not args.disable_tqdm:
            trainer.add_callback(bar)
        try:
            with interrupt:
                trainer.train(resume_from_checkpoint=resume)
        except BaseException:  # a full disk or a second Ctrl-C may have struck in the middle of a checkpoint
            if args.should_save:  # another process may still be about to mark one
                remove_incomplete(directory)
            raise
        finally:
            bar.close()
    if interrupt.agreed(args):  # so late that no checkpoint followed
        raise KeyboardInterrupt
    metrics = trainer.evaluate() if eval_dataset is not None else {}
    pruned: nn.Module = trainer.accelerator.unwrap_model(trainer.model, keep_fp32_wrapper=False)
    names = list(masked_layers(pruned))
    unswap(pruned)
    return PruneResult(
        model=pruned,
        teacher=trainer.teacher.model if trainer.teacher else None,
        metrics=metrics,
        sparsity=measure_sparsity(pruned, names),
        output_dir=directory,
    )


def _claim(directory: Path, config: SDPruneConfig, origin: Mapping[str, Any], args: TrainingArguments) -> str | None:
    """Return the checkpoint to resume from, or None to begin; raise if the folder holds something else."""
    taken = (directory / CONFIG_NAME).exists()
    resume: Any = args.resume_from_checkpoint
    if not resume:
        if taken or any(directory.glob("checkpoint-*")):
            raise ValueError(
                f"output_dir {str(directory)!r} already holds a run; name another folder, or set "
                "resume_from_checkpoint to go on with it"
            )
        return None
    if not taken:
        raise ValueError(f"output_dir {str(directory)!r} holds no run to resume ({CONFIG_NAME} is missing)")
    config_before = SDPruneConfig.from_pretrained(directory).to_dict()
    _check_same(f"the run in {str(directory)!r}", config_before, _read_origin(directory), config, origin)
    with args.main_process_first(local=False, desc="removing incomplete checkpoints"):
        if args.should_save:
            remove_incomplete(directory)
    if isinstance(resume, str) and resume.lower() not in ("true", "latest"):
        marker = read_marker(resume)
        if marker is None:
            raise ValueError(
                f"resume_from_checkpoint {resume!r} is no whole checkpoint of such a run ({MARKER} is missing, or "
                "files that it lists are)"
            )
        before = marker["origin"]
        _check_same(f"resume_from_checkpoint {resume!r}", before.pop("config", {}), before, config, origin)
        return resume
    whole = checkpoints(directory)
    if not whole:
        logger.warning("%s holds no whole checkpoint: the run begins again", directory)
        return None
    return str(whole[-1])


def _read_origin(directory: Path) -> dict[str, Any]:
    path = directory / ORIGIN_NAME
    try:
        return dict(json.loads(path.read_text(encoding="utf-8")))
    except FileNotFoundError:
        raise ValueError(f"output_dir {str(directory)!r} holds no run to resume ({ORIGIN_NAME} is missing)") from None
    except (TypeError, ValueError) as error:
        raise ValueError(f"{str(path)!r} is damaged ({error})") from None


def _check_same(
    what: str,
    config_before: Mapping[str, Any],
    before: Mapping[str, Any],
    config: SDPruneConfig,
    origin: Mapping[str, Any],
) -> None:
    """Raise ValueError that names every field of the configuration, then of the origin, that differs."""
    changed = differences(config_before, config.to_dict())
    if changed:
        raise ValueError(f"{what} has another configuration ({'; '.join(changed)})")
    now = json.loads(json.dumps(origin))  # as a file gives it: lists for tuples
    for part, meaning in ORIGIN_PARTS.items():
        changed = differences({part: before.get(part)}, {part: now[part]})
        if changed:
            raise ValueError(f"{what} began with {meaning} ({'; '.join(changed)}); give it the same again")
