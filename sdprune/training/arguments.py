"""From a `TrainingConfig` to `transformers.TrainingArguments`."""

import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from transformers import TrainingArguments

from sdprune.recipe import TrainingConfig


def training_arguments(
    training: TrainingConfig, output_dir: Path, *, seed: int, resume: bool = False, **overrides: Any
) -> TrainingArguments:
    """Return the arguments of one training; two checkpoints are kept, the newest of which may be half-written."""
    values: dict[str, Any] = {
        "output_dir": str(output_dir),
        "num_train_epochs": training.num_train_epochs,
        "max_steps": training.max_steps,
        "per_device_train_batch_size": training.per_device_train_batch_size,
        "per_device_eval_batch_size": training.per_device_eval_batch_size,
        "gradient_accumulation_steps": training.gradient_accumulation_steps,
        "learning_rate": training.learning_rate,
        "lr_scheduler_type": training.lr_scheduler_type,
        "lr_scheduler_kwargs": {"num_cycles": training.lr_cycles} if training.lr_cycles > 1 else None,
        "warmup_steps": training.warmup_steps,
        "weight_decay": training.weight_decay,
        "max_grad_norm": training.max_grad_norm,
        "use_cpu": not torch.accelerator.is_available(),
        "bf16": settled(training).bf16,
        "logging_steps": training.logging_steps,
        "eval_strategy": "steps",
        "eval_steps": training.eval_steps,
        "save_strategy": "steps",
        "save_steps": training.save_steps,
        "save_total_limit": 2,
        "train_sampling_strategy": "group_by_length",
        "dataloader_pin_memory": torch.cuda.is_available(),
        "report_to": "none",
        "disable_tqdm": False,  # the default follows the verbosity of transformers' own log
        "seed": seed,
        "resume_from_checkpoint": "latest" if resume else None,
    }
    return TrainingArguments(**(values | overrides))


def settled(training: TrainingConfig) -> TrainingConfig:
    """Return the training with `bf16` decided for the device at hand."""
    return replace(training, bf16=bf16_pays()) if training.bf16 is None else training


def bf16_pays(threshold: float = 1.3, repeats: int = 5) -> bool:
    """Time one product in fp32 and in bfloat16 and tell whether bfloat16 is faster by `threshold`.

    CPUs differ: with bfloat16 instructions (AVX-512 BF16, AMX) it is much faster than fp32, without them slower.
    """
    if torch.cuda.is_available():
        return bool(torch.cuda.is_bf16_supported(including_emulation=False))
    best = {}
    for dtype in (torch.float32, torch.bfloat16):
        left, right = torch.ones(512, 512, dtype=dtype), torch.ones(512, 1024, dtype=dtype)
        times = []
        for _ in range(repeats):
            start = time.perf_counter()
            left @ right
            times.append(time.perf_counter() - start)
        best[dtype] = min(times)
    return best[torch.float32] > threshold * best[torch.bfloat16]
