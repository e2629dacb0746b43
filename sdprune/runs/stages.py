"""Trainings one after the other in one folder. A finished one is not repeated, an interrupted one goes on.

stages.json                           what the stages were asked to do; a resumed run must ask for the same
NAME/checkpoint-N/  NAME/metrics.jsonl ...    while a stage runs
NAME/model/  NAME/stage.json          when it is done
"""

from __future__ import annotations

import copy
import json
import shutil
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from accelerate.utils import wait_for_everyone
from torch import nn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from sdprune.config import CONFIG_NAME, SDPruneConfig
from sdprune.exports.export import export
from sdprune.files import write_text
from sdprune.runs.prune import prune

SETTINGS_NAME = "stages.json"
MARKER = "stage.json"


@dataclass(frozen=True)
class StageResult:
    """What a stage leaves.

    Args:
        model: the trained model, dense layers with their zeros in place.
        metrics: its scores on the evaluation data.
        directory: folder of the stage.
    """

    model: nn.Module
    metrics: dict[str, float]
    directory: Path


def without_teacher(config: SDPruneConfig) -> SDPruneConfig:
    """Return the configuration of a stage that prunes by the task alone."""
    return replace(config, distillation=None, task_weight=1.0, gradient_ratio=None, teacher_cache=None)


def without_pruning(config: SDPruneConfig) -> SDPruneConfig:
    """Return the configuration of a stage that only trains."""
    return replace(
        config, target_sparsity=0.0, structure="unstructured", criterion="magnitude", scope="layer", lr_restarts=False
    )


class Stages:
    """Runs trainings in sub-folders of one folder.

    Args:
        directory: a new or empty folder, or with `resume` that of an interrupted run.
        settings: everything that decides what the stages do, as plain values.
        resume: whether to go on with what `directory` holds.

    Raises:
        ValueError: the folder holds something else, or was begun with other settings; they are named.
    """

    def __init__(self, directory: Path, settings: Mapping[str, Any], *, resume: bool) -> None:
        self.directory = directory
        self.settings: dict[str, Any] = json.loads(json.dumps(settings))
        path = directory / SETTINGS_NAME
        if not resume:
            if path.exists() or any(directory.glob("*/checkpoint-*")) or any(directory.glob(f"*/{CONFIG_NAME}")):
                raise ValueError(
                    f"output_dir {str(directory)!r} already holds a run; name another folder, or set "
                    "resume_from_checkpoint to go on with it"
                )
            return
        if not path.exists():
            raise ValueError(f"output_dir {str(directory)!r} holds no run to resume ({SETTINGS_NAME} is missing)")
        earlier = json.loads(path.read_text(encoding="utf-8"))
        names = {**earlier, **self.settings}
        changed = [
            f"{name}: {earlier.get(name)!r} -> {self.settings.get(name)!r}"
            for name in names
            if earlier.get(name) != self.settings.get(name)
        ]
        if changed:
            raise ValueError(f"the run in {str(directory)!r} has other settings ({'; '.join(changed)})")

    def run(
        self,
        name: str,
        model: Any,
        config: SDPruneConfig,
        train_dataset: Any,
        eval_dataset: Any,
        *,
        args: TrainingArguments,
        callbacks: Iterable[TrainerCallback] | None = None,
        **options: Any,
    ) -> StageResult:
        """Carry out one stage with `prune`, or load what it left.

        Args:
            name: folder of the stage.
            model: a transformers model; trained in place.
            config: what is pruned and distilled.
            train_dataset: as of `prune`.
            eval_dataset: as of `prune`.
            args: as of `prune`; the folder is replaced.
            callbacks: as of `prune`.
            **options: as of `prune`.
        """
        folder = self.directory / name
        if (folder / MARKER).exists():
            metrics = json.loads((folder / MARKER).read_text(encoding="utf-8"))
            loaded = type(model).from_pretrained(folder / "model", dtype=model.dtype)
            return StageResult(loaded, metrics, folder)
        own = copy.copy(args)
        own.output_dir = str(folder)
        own.resume_from_checkpoint = "latest" if (folder / CONFIG_NAME).exists() else None
        claim = _Claim(self.directory / SETTINGS_NAME, self.settings)
        result = prune(
            model, config, train_dataset, eval_dataset, args=own, callbacks=[*(callbacks or ()), claim], **options
        )
        if args.should_save:
            shutil.rmtree(folder / "model", ignore_errors=True)  # of a run that was killed before its marker
            export(result.model, folder / "model", config=config, processing_class=options.get("processing_class"))
            write_text(folder / MARKER, json.dumps(result.metrics, indent=2) + "\n")
        wait_for_everyone()
        return StageResult(result.model, result.metrics, folder)


class _Claim(TrainerCallback):
    """Writes the settings when a training begins, so that a refused run leaves the folder free."""

    def __init__(self, path: Path, settings: Mapping[str, Any]) -> None:
        self.path, self.settings = path, settings

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if state.is_world_process_zero and not self.path.exists():
            write_text(self.path, json.dumps(self.settings, indent=2) + "\n")
