"""Checkpoints that are whole: which of them a run may resume from.

The Trainer writes `checkpoint-N` in place, file by file, and removes old ones the same way; a kill in between leaves a
folder that looks like a checkpoint. A marker, written last, tells the whole ones: it lists every file and its size.
"""

import json
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import torch.distributed
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from sdprune.files import write_text

MARKER = "sdprune_complete.json"


class MarkComplete(TrainerCallback):
    """Marks every checkpoint once all of its files are written.

    Args:
        origin: plain values that tell what the run began with; kept in the marker.
    """

    def __init__(self, origin: Mapping[str, Any] | None = None) -> None:
        self.origin = dict(origin or {})

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Write the marker, after every process has written its files."""
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            torch.distributed.barrier()
        if state.is_world_process_zero:
            folder = Path(str(args.output_dir)) / f"checkpoint-{state.global_step}"
            values = {"global_step": state.global_step, "files": _sizes(folder), "origin": self.origin}
            write_text(folder / MARKER, json.dumps(values, indent=1) + "\n")


def read_marker(folder: str | Path) -> dict[str, Any] | None:
    """Return what the marker of a checkpoint says, or None if the checkpoint is not whole."""
    folder = Path(folder)
    try:
        values = json.loads((folder / MARKER).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    listed = values.get("files") if isinstance(values, dict) else None
    if not isinstance(listed, dict):
        return None
    found = _sizes(folder)
    return values if all(found.get(name) == size for name, size in listed.items()) else None


def checkpoints(directory: str | Path) -> list[Path]:
    """Return the whole checkpoints under `directory`, oldest first."""
    whole = [path for path in _numbered(directory) if read_marker(path) is not None]
    return sorted(whole, key=lambda path: int(path.name[11:]))


@contextmanager
def no_empty_folder(directory: Path) -> Iterator[None]:
    """Remove `directory` and those above it that are new and empty when the block raises.

    The Trainer makes its output folder before anything is checked.
    """
    new = [path for path in (directory, *directory.parents) if not path.exists()]
    try:
        yield
    except BaseException:
        with suppress(OSError):  # not empty, or already removed by another process
            for path in new:
                path.rmdir()
        raise


def remove_incomplete(directory: str | Path) -> None:
    """Remove the checkpoints that an interruption left half-written or half-removed."""
    for path in _numbered(directory):
        if read_marker(path) is None:
            shutil.rmtree(path)


def _numbered(directory: str | Path) -> list[Path]:
    return [path for path in Path(directory).glob("checkpoint-*") if path.is_dir() and path.name[11:].isdecimal()]


def _sizes(folder: Path) -> dict[str, int]:
    """Return the size of every file by its path inside the folder; temporary ones, which begin with a dot, aside."""
    files = [path for path in folder.rglob("*") if path.is_file() and path.name != MARKER]
    return {
        path.relative_to(folder).as_posix(): path.stat().st_size
        for path in sorted(files)
        if not path.name.startswith(".")
    }
