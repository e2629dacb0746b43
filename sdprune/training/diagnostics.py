"""`Diagnostics`: measures class separability, signal-to-noise and convergence while a model is pruned."""

import math
from typing import Any, cast

import torch
from torch import Tensor
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from sdprune.analysis.measures import class_separability, recoveries, signal_to_noise
from sdprune.config import SDPruneConfig
from sdprune.distillation.features import body_output, gather, need_hidden_states, row_names, token_mask
from sdprune.distillation.teacher import Teacher
from sdprune.masking.schedule import pruning_moments
from sdprune.training.checks import has_rows
from sdprune.training.trainer import SDPruneTrainer

NOT_SCORES = ("eval_loss", "eval_runtime", "eval_samples_per_second", "eval_steps_per_second", "eval_model")


class Diagnostics(TrainerCallback):
    """Logs the diagnostics of `sdprune.analysis` on a held-out part, every `config.diagnostics_steps` steps.

    The part is the first `config.diagnostics_examples` evaluation examples. "separability" (where the labels are
    classes, one an example) and "signal_to_noise" (with a teacher) speak of the representation of the configuration,
    one row an example: the mean where that compares tokens or logits; of the first where several layers are chosen.
    At the end "recovery_steps", "recovered" (a fraction of the pruning steps) and "recovery_score" sum up the
    evaluations: mean steps until the first score is back at 99 %, how often that happened, mean score in between.
    Values that are not finite are left out.

    Args:
        trainer: whose model, teacher and evaluation data are measured. Add this callback to it after it was built.

    Raises:
        ValueError: the trainer has no evaluation data with a length.
    """

    def __init__(self, trainer: SDPruneTrainer) -> None:
        self.trainer = trainer
        self.config = trainer.sdprune_config
        dataset: Any = trainer.eval_dataset
        if not has_rows(dataset) or isinstance(dataset, dict):
            raise ValueError(
                f"diagnostics_steps={self.config.diagnostics_steps} measures on the evaluation data: pass one "
                f"eval_dataset with a length, got {type(dataset).__name__}"
            )
        self.rows = [dataset[row] for row in range(min(len(dataset), self.config.diagnostics_examples))]
        self.name = _row_name(self.config)
        self.taught: Tensor | None = None

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Measure, if it is time."""
        if state.global_step % cast(int, self.config.diagnostics_steps) == 0:
            due = control.should_log
            self._log(self.measure())
            control.should_log = due  # of the losses of this step, which the row above would take for written

    def on_train_end(self, args: Any, state: TrainerState, control: Any, **kwargs: Any) -> None:
        """Sum up how the scores came back after the pruning steps."""
        moments = [each for each in pruning_moments(self.config, state.max_steps) if each < state.global_step]
        found = recoveries(scores(state.log_history), moments)
        steps = [each.steps for each in found if each.steps is not None]
        areas = [each.area for each in found if each.area is not None]
        if found:
            self._log(
                {
                    "recovery_steps": sum(steps) / len(steps) if steps else math.nan,
                    "recovered": len(steps) / len(found),
                    "recovery_score": sum(areas) / len(areas) if areas else math.nan,
                }
            )

    def _log(self, values: dict[str, float]) -> None:
        finite = {name: value for name, value in values.items() if math.isfinite(value)}
        if finite:
            self.trainer.log(finite)

    @torch.no_grad()
    def measure(self) -> dict[str, float]:
        """Return "separability" and "signal_to_noise" of the model as it is now, where they can be measured."""
        model: Any = self.trainer.accelerator.unwrap_model(self.trainer.model)
        training = model.training
        model.eval()
        try:
            batches = [self.trainer._prepare_inputs(batch) for batch in self._batches()]
            student = torch.cat([self._features(model, batch) for batch in batches])
            if self.trainer.teacher is not None and self.taught is None:
                self.taught = torch.cat([self._teach(self.trainer.teacher, batch) for batch in batches])
        finally:
            model.train(training)
        values = {}
        labels = [batch["labels"] for batch in batches if "labels" in batch]
        if len(labels) == len(batches) and labels[0].dim() == 1 and not labels[0].is_floating_point():
            classes = torch.cat(labels)
            if bool((classes != classes[0]).any()):
                values["separability"] = class_separability(student, classes)
        if self.taught is not None and self.taught.shape == student.shape:
            values["signal_to_noise"] = signal_to_noise(student, self.taught)
        return values

    def _batches(self) -> list[Any]:
        # no DataLoader: it would draw from the random numbers of the training
        collate = self.trainer._get_collator_with_removed_columns(self.trainer.data_collator)
        size = self.trainer.args.eval_batch_size
        return [collate(self.rows[start : start + size]) for start in range(0, len(self.rows), size)]

    def _features(self, model: Any, batch: dict[str, Any]) -> Tensor:
        options = {"output_hidden_states": True} if need_hidden_states([self.name]) else {}
        with body_output(model) as bodies, self.trainer.accelerator.autocast():
            outputs = model(**batch, **options)
        return gather([self.name], outputs.logits, bodies, token_mask(batch, model))[self.name].float()

    def _teach(self, teacher: Teacher, batch: dict[str, Any]) -> Tensor:
        with self.trainer.accelerator.autocast():
            return teacher(batch, [self.name])[self.name].float()


def _row_name(config: SDPruneConfig) -> str:
    kind, _, layer = row_names(config)[0].partition("@")
    kind = "mean" if kind in ("tokens", "logits") else kind
    return f"{kind}@{layer}" if layer else kind


def scores(history: list[dict[str, Any]]) -> list[tuple[int, float]]:
    """Return (step, score) of every evaluation in a log; the score is its first value that is no loss and no time."""
    found = []
    for row in history:
        names = [name for name in row if name.startswith("eval_") and not name.startswith(NOT_SCORES)]
        if names:
            found.append((int(row["step"]), float(row[names[0]])))
    return found
