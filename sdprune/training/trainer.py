"""`SDPruneTrainer`: the transformers Trainer with the distillation terms added to its loss."""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.utils.data import Sampler, SequentialSampler
from transformers import Trainer

from sdprune.config import SDPruneConfig
from sdprune.data.sampler import LengthBucketSampler
from sdprune.distillation.objectives import distillation_terms
from sdprune.distillation.teacher import Teacher, body_output, signals
from sdprune.masking.pruner import masked_fraction


class SDPruneTrainer(Trainer):
    """A `transformers.Trainer` whose loss has the distillation terms of `config`; it does not prune.

    Add `SDPruneCallback(config)` to its callbacks to prune. Evaluation runs without the teacher, and `eval_loss`
    is the task loss. Every loss is the mean over a micro-batch, then over the accumulated ones. With
    `train_sampling_strategy="group_by_length"` batches are made by `LengthBucketSampler`, whose order survives an
    interruption, and evaluation stays in the order of the data set.

    Args:
        *args: as of `transformers.Trainer`.
        config: what is distilled, and with which weights.
        teacher_model: the teacher; None: a frozen copy of the model as it is now.
        **kwargs: as of `transformers.Trainer`.

    Raises:
        ValueError: no teacher is given and the model is pruned already, the teacher is the model itself or has other
            classes, an objective does not fit the model, or one process sees several GPUs.
        FloatingPointError: while training, when a part of the loss is not finite; the part is named.
    """

    def __init__(
        self, *args: Any, config: SDPruneConfig, teacher_model: nn.Module | None = None, **kwargs: Any
    ) -> None:
        super().__init__(*args, **kwargs)
        if self.args.n_gpu > 1:
            raise ValueError(
                f"{self.args.n_gpu} GPUs in one process would be driven by torch.nn.DataParallel, which splits batches "
                "behind the teacher's back; start one process a GPU with torchrun, or set CUDA_VISIBLE_DEVICES=0"
            )
        # Models whose forward takes **kwargs would make the Trainer normalise the task loss over the accumulated
        # batch, which it cannot do for the distillation terms: both are means over the micro-batch instead.
        self.model_accepts_loss_kwargs = False
        if hasattr(Trainer, "loss_is_scaled_for_ga"):
            self.loss_is_scaled_for_ga = False
        self.sdprune_config = config
        self._check_objectives(cast(nn.Module, self.model), config)
        self.teacher = self._make_teacher(teacher_model) if config.distillation_weights else None
        self._parts: dict[str, Tensor] = {}
        self._part_count = 0

    @staticmethod
    def _check_objectives(model: nn.Module, config: SDPruneConfig) -> None:
        """Refuse before anything is written what the first step would refuse."""
        used = config.distillation_weights
        if "kl" in used and getattr(getattr(model, "config", None), "num_labels", None) == 1:
            raise ValueError("distillation 'kl' compares class probabilities, but the model predicts one number")
        body = getattr(model, getattr(model, "base_model_prefix", ""), model)
        compares_features = "cross_correlation" in used or "cosine" in used
        if compares_features and config.representation == "pooled" and getattr(body, "pooler", None) is None:
            raise ValueError("representation='pooled', but the model has no pooler; choose first, mean or tokens")

    def _make_teacher(self, teacher_model: nn.Module | None) -> Teacher:
        if teacher_model is None:
            return Teacher(cast(nn.Module, self.model), copy_model=True)
        if teacher_model is self.model:
            raise ValueError("teacher_model is the model itself; leave it out to have a frozen copy made")
        student, teacher = (getattr(m, "config", None) for m in (self.model, teacher_model))
        classes = [getattr(c, "num_labels", None) for c in (student, teacher)]
        if classes[0] != classes[1]:
            raise ValueError(f"teacher_model has {classes[1]} classes, the model has {classes[0]}")
        return Teacher(teacher_model.to(self.args.device), copy_model=False)

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        """Return the task loss plus, while training, the weighted distillation terms."""
        if not model.training:
            return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        config = self.sdprune_config
        with body_output(self.accelerator.unwrap_model(model)) as bodies:
            task, outputs = super().compute_loss(model, inputs, True, num_items_in_batch)
        parts = {"task": task}
        loss = task
        if self.teacher is not None:
            with self.accelerator.autocast():
                teacher = self.teacher(inputs)
            student = signals(outputs.logits, bodies)
            terms = distillation_terms(student, teacher, inputs.get("attention_mask"), config)
            for name, weight in config.distillation_weights.items():
                loss = loss + config.distillation_weight * weight * terms[name]
            parts |= terms
        self._record(parts)
        return (loss, outputs) if return_outputs else loss

    def _record(self, parts: dict[str, Tensor]) -> None:
        for name, value in parts.items():
            # The Trainer waits for the loss each step anyway; its own filter would hide a NaN from the log.
            if not torch.isfinite(value):
                raise FloatingPointError(
                    f"the {name} loss is {value.item()} at step {self.state.global_step + 1}; "
                    "lower learning_rate or distillation_weight, or train without bf16"
                )
            self._parts[name] = self._parts.get(name, 0.0) + value.detach()
        self._part_count += 1

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        """Add the parts of the loss and the sparsity to the training rows; user callbacks run too late for that."""
        if "loss" in logs and self._part_count:
            logs |= {f"loss_{name}": total.item() / self._part_count for name, total in self._parts.items()}
            logs["sparsity"] = masked_fraction(self.accelerator.unwrap_model(self.model))
            self._parts, self._part_count = {}, 0
        super().log(logs, *args, **kwargs)

    def _get_train_sampler(self, train_dataset: Any = None) -> Sampler[int] | None:
        dataset: Any = self.train_dataset if train_dataset is None else train_dataset
        if self.args.train_sampling_strategy != "group_by_length":
            return super()._get_train_sampler(train_dataset)
        lengths = getattr(dataset, "lengths", None) or [len(row["input_ids"]) for row in dataset]
        seed = self.args.seed if self.args.data_seed is None else self.args.data_seed
        return LengthBucketSampler(lengths, self.args.train_batch_size, seed=seed)

    def _get_eval_sampler(self, eval_dataset: Any) -> Sampler[int] | None:
        if self.args.train_sampling_strategy != "group_by_length":
            return super()._get_eval_sampler(eval_dataset)
        return SequentialSampler(eval_dataset) if self.args.world_size <= 1 else None
