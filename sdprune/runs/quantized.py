"""Pruning, int8 quantization and distillation, one after the other: PQK, and prune-quantize-distill."""

from __future__ import annotations

import copy
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import TrainingArguments

from sdprune.config import SDPruneConfig
from sdprune.masking.select import select_linears
from sdprune.runs.int8 import QuantizationCallback, check_torchao, quantize
from sdprune.runs.stages import StageResult, Stages, without_pruning, without_teacher


@dataclass(frozen=True)
class QuantizedResult:
    """What `pqk` and `prune_quantize_distill` return.

    Args:
        model: the pruned model with unrounded weights, which are exported.
        int8: the same model with int8 layers.
        stages: what every stage left, in order.
    """

    model: nn.Module
    int8: nn.Module
    stages: dict[str, StageResult]


def pqk(
    model: Any,
    config: SDPruneConfig,
    train_dataset: Any,
    eval_dataset: Any = None,
    *,
    args: TrainingArguments,
    retraining_args: TrainingArguments,
    callbacks: Any = (),
    **options: Any,
) -> QuantizedResult:
    """Prune with quantization-aware training, then let the full network teach the pruned one.

    PQK (Kim, Chang and Kwak 2021, https://arxiv.org/abs/2106.14681), a reconstruction from its abstract: the teacher
    is the network with the pruned weights put back and trained on the task, so that no other model is needed. Stages:
    `pruned` (pruning and int8, task loss alone), `teacher` (kept weights as they are now, pruned ones as they were,
    trained without pruning), `student` (the pruned network, int8, zeros kept, taught by the teacher).

    Args:
        model: a fine-tuned transformers model; changed in place.
        config: what is pruned; the distillation fields are those of the last stage.
        train_dataset: as of `transformers.Trainer`.
        eval_dataset: as of `transformers.Trainer`.
        args: of the first stage; as of `prune`.
        retraining_args: of the later stages.
        callbacks: more callbacks.
        **options: more arguments of `prune`.

    Raises:
        ImportError: torchao is absent.
        ValueError: as of `prune`.
    """
    stages, original = _begin(model, config, args)
    run = _runner(stages, train_dataset, eval_dataset, callbacks, options)
    pruned = run("pruned", model, without_teacher(config), args, quantized=True)
    full = _put_back(pruned.model, original, select_linears(model, config))
    dense = without_pruning(without_teacher(config))
    teacher = run("teacher", full, dense, retraining_args, quantized=False)
    student = run(
        "student", pruned.model, _zeros_kept(config), retraining_args, quantized=True, teacher_model=teacher.model
    )
    return _result(student.model, config, {"pruned": pruned, "teacher": teacher, "student": student})


def prune_quantize_distill(
    model: Any,
    config: SDPruneConfig,
    train_dataset: Any,
    eval_dataset: Any = None,
    *,
    args: TrainingArguments,
    retraining_args: TrainingArguments,
    callbacks: Any = (),
    **options: Any,
) -> QuantizedResult:
    """Prune, then train with int8 quantization, then distil from the dense model, in that order.

    After Prune-Quantize-Distill (https://arxiv.org/abs/2604.04988), a reconstruction from its abstract. Stages:
    `pruned` (task loss alone), `quantized` (int8, zeros kept), `distilled` (int8, zeros kept, taught by the model as
    it was before pruning).

    Args:
        model: a fine-tuned transformers model; changed in place.
        config: what is pruned; the distillation fields are those of the last stage.
        train_dataset: as of `transformers.Trainer`.
        eval_dataset: as of `transformers.Trainer`.
        args: of the first stage; as of `prune`.
        retraining_args: of the later stages.
        callbacks: more callbacks.
        **options: more arguments of `prune`.

    Raises:
        ImportError: torchao is absent.
        ValueError: as of `prune`.
    """
    stages, original = _begin(model, config, args)
    run = _runner(stages, train_dataset, eval_dataset, callbacks, options)
    kept = _zeros_kept(config)
    pruned = run("pruned", model, without_teacher(config), args, quantized=False)
    rounded = run("quantized", pruned.model, without_teacher(kept), retraining_args, quantized=True)
    distilled = run("distilled", rounded.model, kept, retraining_args, quantized=True, teacher_model=original)
    return _result(distilled.model, config, {"pruned": pruned, "quantized": rounded, "distilled": distilled})


def _begin(model: Any, config: SDPruneConfig, args: TrainingArguments) -> tuple[Stages, Any]:
    """Return the stages and a copy of the model as it is before them."""
    check_torchao()
    if not config.distillation_weights:
        raise ValueError("distillation is None, but the last stage learns by it; choose 'kl' or another objective")
    if config.target_sparsity == 0.0:
        raise ValueError("target_sparsity is 0, but the first stage prunes; choose one above 0")
    directory = Path(str(args.output_dir))
    return Stages(directory, config.to_dict(), resume=bool(args.resume_from_checkpoint)), copy.deepcopy(model)


def _runner(stages: Stages, train: Any, evaluation: Any, callbacks: Any, options: dict[str, Any]) -> Any:
    def run(
        name: str, model: Any, config: SDPruneConfig, args: TrainingArguments, *, quantized: bool, **more: Any
    ) -> StageResult:
        own = [QuantizationCallback()] if quantized else []
        return stages.run(
            name, model, config, train, evaluation, args=args, callbacks=[*own, *callbacks], **options, **more
        )

    return run


def _zeros_kept(config: SDPruneConfig) -> SDPruneConfig:
    """Return a configuration that finds the zeros of a pruned model at its first step, and keeps them.

    The weights of least magnitude are the zeros, and there are as many of them as the target asks for.
    """
    return replace(
        config,
        criterion="magnitude",
        schedule="one_shot",
        pruning_steps=1,
        start_ratio=0.0,
        end_ratio=0.0,
        lr_restarts=False,
    )


@torch.no_grad()
def _put_back(pruned: Any, original: Any, names: list[str]) -> Any:
    """Return a copy of the pruned model with the original values where it has zeros."""
    full = copy.deepcopy(pruned)
    for name in names:
        weight = full.get_parameter(f"{name}.weight")
        weight.copy_(torch.where(weight == 0, original.get_parameter(f"{name}.weight").to(weight), weight))
    return full


def _result(model: Any, config: SDPruneConfig, stages: dict[str, StageResult]) -> QuantizedResult:
    return QuantizedResult(model, quantize(model, select_linears(model, config)), stages)
