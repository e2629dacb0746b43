"""Checkpoints that are whole: which of them a run may resume from.

The Trainer writes `checkpoint-N` in place, file by file; a kill in between leaves a folder that looks like a
checkpoint. A marker written last tells the whole ones.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from sdprune.files import write_text

MARKER = "sdprune_complete.json"


class MarkComplete(TrainerCallback):
    """Marks every checkpoint once all of its files are written."""

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Write the marker."""
        if state.is_world_process_zero:
            folder = Path(str(args.output_dir)) / f"checkpoint-{state.global_step}"
            write_text(folder / MARKER, json.dumps({"global_step": state.global_step}) + "\n")


def checkpoints(directory: str | Path) -> list[Path]:
    """Return the whole checkpoints under `directory`, oldest first."""
    found = [path.parent for path in Path(directory).glob(f"checkpoint-*/{MARKER}")]
    return sorted(found, key=lambda path: int(path.name.removeprefix("checkpoint-")))


def remove_incomplete(directory: str | Path) -> None:
    """Remove the checkpoints that an interruption left half-written."""
    whole = checkpoints(directory)
    for path in Path(directory).glob("checkpoint-*"):
        if path.is_dir() and path not in whole:
            shutil.rmtree(path)
