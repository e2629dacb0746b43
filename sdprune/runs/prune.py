"""`prune`: self-distilled pruning of one model, from a dense Transformer to one with exact zeros."""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn
from transformers import PrinterCallback, ProgressCallback, TrainerCallback, TrainingArguments

from sdprune.config import SDPruneConfig
from sdprune.masking.bare import check_bare
from sdprune.masking.pruner import Sparsity, measure_sparsity
from sdprune.masking.swap import masked_layers, unswap
from sdprune.training.callback import SDPruneCallback
from sdprune.training.checkpoint import MarkComplete, no_empty_folder, remove_incomplete
from sdprune.training.checks import check_config, has_rows
from sdprune.training.diagnostics import Diagnostics
from sdprune.training.folder import RunFolder, claim
from sdprune.training.origin import run_origin
from sdprune.training.progress import FinishStepOnInterrupt, ProgressBar
from sdprune.training.trainer import SDPruneTrainer


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
        model: a fine-tuned transformers model, neither wrapped nor compiled; changed in place, hooks of layers stay.
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
        ValueError: the configuration does not fit the model or the training, a layer or the model is more than it can
            mask (the message says what to do), `output_dir` holds another run, or the arguments ask for what cannot be
            done right, such as resuming with a stream of rows.
        TypeError: a model is no module, `config` no configuration, or the rows are none.
        TrainingInterrupted: Ctrl-C; the step was finished and a checkpoint saved.
    """
    check_config(config)
    args = args or TrainingArguments(output_dir="sdprune_output", seed=config.seed, report_to="none")
    callbacks = list(callbacks or ())
    _check(model, teacher_model, args, train_dataset, callbacks)
    bar, interrupt = ProgressBar("pruning" if config.target_sparsity else "training"), FinishStepOnInterrupt()
    directory, origin = Path(str(args.output_dir)), run_origin(model, teacher_model, train_dataset, args)
    resume = claim(directory, config, origin, args)
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
            callbacks=[SDPruneCallback(config), *callbacks, *watchers],
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
    names, pruned = list(masked_layers(pruned)), unswap(pruned)
    return PruneResult(
        model=pruned,
        teacher=trainer.teacher.model if trainer.teacher else None,
        metrics=metrics,
        sparsity=measure_sparsity(pruned, names),
        output_dir=directory,
    )


def _check(
    model: Any, teacher_model: Any, args: TrainingArguments, train_dataset: Any, callbacks: Iterable[Any]
) -> None:
    """Refuse what cannot be masked, and what the Trainer would do silently wrong."""
    check_bare(model)
    if teacher_model is not None:
        check_bare(teacher_model, "teacher_model")
    by_number = has_rows(train_dataset)
    if train_dataset is None or (by_number and not len(train_dataset)):
        raise ValueError(f"train_dataset must have at least one row, got {train_dataset!r:.80}")
    if not by_number and not hasattr(train_dataset, "__iter__"):
        raise TypeError(f"train_dataset must have rows by number, or be a stream of them, got {train_dataset!r:.80}")
    if isinstance(train_dataset, Iterator):
        raise TypeError(
            f"train_dataset must be read more than once, got {type(train_dataset).__name__}; make it a list, or a "
            "torch.utils.data.IterableDataset"
        )
    if not by_number and args.max_steps <= 0:
        raise ValueError(
            f"max_steps must be positive where train_dataset is a stream, of unknown length, got {args.max_steps}"
        )
    if args.resume_from_checkpoint and not by_number:
        raise ValueError(
            f"resume_from_checkpoint={args.resume_from_checkpoint!r} needs a train_dataset with a length and rows by "
            f"number: whether the stream {type(train_dataset).__name__} gives the same rows again is not known"
        )
    if any(each is SDPruneCallback or isinstance(each, SDPruneCallback) for each in callbacks):
        raise ValueError("callbacks holds an SDPruneCallback, but `prune` adds its own; leave it out")
    for name in ("bf16_full_eval", "fp16_full_eval"):
        if getattr(args, name, False):
            raise ValueError(
                f"{name}=True would leave the pruned weights in half precision: the Trainer casts the model itself to "
                f"score it; leave it out, {name[:4]}=True scores in autocast"
            )
    if "underflow_overflow" in args.debug:
        raise ValueError(
            "debug='underflow_overflow' would leave its hooks in the pruned model, whose layers they do not know: none "
            "of its forward passes would end; leave it out"
        )
