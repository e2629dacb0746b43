"""Trainings one after the other in one folder. A finished one is not repeated, an interrupted one goes on.

stages.json                           what the stages were asked to do; a resumed run must ask for the same
NAME/checkpoint-N/  NAME/metrics.jsonl ...    while a stage runs
NAME/model/  NAME/stage.json          when it is done
"""

import copy
import json
import shutil
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from accelerate.utils import wait_for_everyone
from torch import nn
from transformers import TrainerCallback, TrainingArguments

from sdprune.config import SDPruneConfig
from sdprune.exports.export import export
from sdprune.files import write_text
from sdprune.runs.prune import prune
from sdprune.training.folder import STAGES_NAME, WriteAtStart, claim_stages, is_begun

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
        claim_stages(directory, self.settings, resume=resume)

    def run(
        self,
        name: str,
        model: Any,
        config: SDPruneConfig,
        *,
        args: TrainingArguments,
        callbacks: Iterable[TrainerCallback] | None = None,
        **inputs: Any,
    ) -> StageResult:
        """Carry out one stage with `prune`, or load what it left.

        Args:
            name: folder of the stage.
            model: a transformers model; trained in place.
            config: what is pruned and distilled.
            args: as of `prune`; the folder is replaced.
            callbacks: as of `prune`.
            **inputs: the other arguments of `prune`.
        """
        folder = self.directory / name
        if (folder / MARKER).exists():
            metrics = json.loads((folder / MARKER).read_text(encoding="utf-8"))
            loaded = type(model).from_pretrained(folder / "model", dtype=model.dtype)
            return StageResult(loaded, metrics, folder)
        own = copy.copy(args)
        own.output_dir = str(folder)
        own.resume_from_checkpoint = "latest" if is_begun(folder) else None
        begun = WriteAtStart(self.directory / STAGES_NAME, json.dumps(self.settings, indent=2) + "\n")
        result = prune(model, config, args=own, callbacks=[*(callbacks or ()), begun], **inputs)
        if args.should_save:
            shutil.rmtree(folder / "model", ignore_errors=True)  # of a run that was killed before its marker
            export(result.model, folder / "model", config=config, processing_class=inputs.get("processing_class"))
            write_text(folder / MARKER, json.dumps(result.metrics, indent=2) + "\n")
        wait_for_everyone()
        return StageResult(result.model, result.metrics, folder)
