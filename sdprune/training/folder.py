"""The folder of a run: what it holds, whether it is free, and what an interrupted run goes on from.

recipe.yaml                                what `sdprune prune` was asked to do
stages.json                                what several trainings, each in a folder of its own, were asked to do
sdprune_origin.json  sdprune_config.json   what a training began with, and how it prunes
metrics.jsonl  checkpoint-N/               its log and its checkpoints
model/  metrics.json                       what came of it, and the scores of a finished run

All of them are written when a training begins, or later: a refused run leaves the folder free.
"""

import json
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from sdprune.config import CONFIG_NAME, SDPruneConfig
from sdprune.files import write_text
from sdprune.recipe import RECIPE_NAME
from sdprune.training.checkpoint import MARKER, checkpoints, read_marker, remove_incomplete
from sdprune.training.origin import differences

ORIGIN_NAME = "sdprune_origin.json"
STAGES_NAME = "stages.json"
METRICS_NAME = "metrics.jsonl"
SCORES_NAME = "metrics.json"

logger = logging.getLogger(__name__)

_ORIGIN_PARTS = {
    "training": "other training arguments",
    "data": "another train_dataset",
    "model": "another model (build the dense one again, as it was before any masks and zeros)",
    "teacher": "another teacher_model",
}


def is_begun(directory: Path) -> bool:
    """Tell whether a training, or the first of several, has begun in a folder."""
    return (directory / CONFIG_NAME).exists() or (directory / STAGES_NAME).exists()


def check_free(directory: Path, *traces: str, output: bool = False) -> None:
    """Raise ValueError if a folder holds a run or `traces` of one or, where it is a command's `output`, anything."""
    if is_begun(directory) or any(any(directory.glob(pattern)) for pattern in traces):
        advice = f"go on with it: sdprune prune --resume {directory}"
        raise ValueError(
            f"{'output' if output else 'output_dir'} {str(directory)!r} already holds a run; name another folder, or "
            + (advice if output else "set resume_from_checkpoint to go on with it")
        )
    if output and directory.exists() and (not directory.is_dir() or any(directory.iterdir())):
        raise ValueError(f"output {str(directory)!r} is not an empty folder; name another one or remove it")


def recipe_of(directory: Path) -> Path:
    """Return the recipe of the interrupted run in a folder.

    Raises:
        ValueError: it holds no run, or one that is finished.
    """
    if not (directory / RECIPE_NAME).exists():
        raise ValueError(f"--resume: {str(directory)!r} holds no run ({RECIPE_NAME} is missing)")
    if (directory / SCORES_NAME).exists():
        raise ValueError(f"the run in {str(directory)!r} is finished; its scores are in {SCORES_NAME}")
    return directory / RECIPE_NAME


def run_of(checkpoint: Path) -> Path | None:
    """Return the folder of the run, or of the run one of whose stages, saved a checkpoint; None if it has no recipe."""
    return next((path for path in checkpoint.parents[:2] if (path / RECIPE_NAME).exists()), None)


def model_of(source: Path) -> Path:
    """Return the model of a finished run, the newest whole checkpoint of an unfinished one, or the folder itself."""
    finished = source / "model"
    return finished if (finished / "config.json").is_file() else next(reversed(checkpoints(source)), source)


def config_of(*folders: Path) -> SDPruneConfig | None:
    """Return the configuration in the first of the folders that has one."""
    return next((SDPruneConfig.from_pretrained(path) for path in folders if (path / CONFIG_NAME).exists()), None)


def claim(directory: Path, config: SDPruneConfig, origin: Mapping[str, Any], args: TrainingArguments) -> str | None:
    """Return the checkpoint from which a training goes on, or None where it begins.

    Args:
        directory: of the training.
        config: of the training.
        origin: what it begins with, of `run_origin`.
        args: of the Trainer; `resume_from_checkpoint` says whether, and perhaps from where, it goes on.

    Raises:
        ValueError: the folder holds a run that is not to go on, none that could, or one that began with something else.
    """
    resume: Any = args.resume_from_checkpoint
    if not resume:
        check_free(directory, "checkpoint-*")
        return None
    if not (directory / CONFIG_NAME).exists():
        raise ValueError(f"output_dir {str(directory)!r} holds no run to resume ({CONFIG_NAME} is missing)")
    config_before = SDPruneConfig.from_pretrained(directory).to_dict()
    _check_same(f"the run in {str(directory)!r}", config_before, _read(directory, ORIGIN_NAME), config, origin)
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
        return _with_optimizer(Path(resume))
    whole = checkpoints(directory)
    if not whole:
        logger.warning("%s holds no whole checkpoint: the run begins again", directory)
        return None
    return _with_optimizer(whole[-1])


def _with_optimizer(checkpoint: Path) -> str:
    """Return a checkpoint; raise ValueError if `save_only_model` left out what an exact continuation needs."""
    if not any("optim" in name for name in (read_marker(checkpoint) or {"files": ()})["files"]):
        raise ValueError(
            f"resume_from_checkpoint: {str(checkpoint)!r} holds no state of the optimizer (save_only_model=True), so "
            "the run cannot go on exactly; begin again, with save_only_model=False"
        )
    return str(checkpoint)


def claim_stages(directory: Path, settings: Mapping[str, Any], *, resume: bool) -> None:
    """Check that several trainings may begin in a folder, or go on in it.

    Raises:
        ValueError: the folder holds a run, or with `resume` none, or one of other settings; they are named.
    """
    if not resume:
        check_free(directory, "*/checkpoint-*", f"*/{CONFIG_NAME}")
        return
    changed = differences(_read(directory, STAGES_NAME), settings)
    if changed:
        raise ValueError(f"the run in {str(directory)!r} has other settings ({'; '.join(changed)})")


def _read(directory: Path, name: str) -> dict[str, Any]:
    path = directory / name
    try:
        return dict(json.loads(path.read_text(encoding="utf-8")))
    except FileNotFoundError:
        raise ValueError(f"output_dir {str(directory)!r} holds no run to resume ({name} is missing)") from None
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
    for part, meaning in _ORIGIN_PARTS.items():
        changed = differences({part: before.get(part)}, {part: now[part]})
        if changed:
            raise ValueError(f"{what} began with {meaning} ({'; '.join(changed)}); give it the same again")


class WriteAtStart(TrainerCallback):
    """Writes a file of the run when a training begins: a recipe, or the settings of several trainings."""

    def __init__(self, path: Path, text: str) -> None:
        self.path, self.text = path, text

    def on_train_begin(self, args: Any, state: TrainerState, control: Any, **kwargs: Any) -> None:
        """Write it, whole."""
        if state.is_world_process_zero:
            write_text(self.path, self.text)


class RunFolder(TrainerCallback):
    """Marks the folder once the training begins, and keeps its log in `metrics.jsonl`.

    A resumed run first drops the rows that it will repeat. Must come after `SDPruneCallback`, which refuses trainings
    that do not fit.
    """

    def __init__(self, directory: Path, config: SDPruneConfig, origin: Mapping[str, Any]) -> None:
        self.directory = directory
        self.config = config
        self.origin = dict(origin)

    def on_train_begin(self, args: Any, state: TrainerState, control: Any, **kwargs: Any) -> None:
        """Write the origin, the configuration, and the rows that the checkpoint knows of; none at the start."""
        if state.is_world_process_zero:
            write_text(self.directory / ORIGIN_NAME, json.dumps(self.origin, indent=1) + "\n")
            self.config.save_pretrained(self.directory)  # last of the two: a folder that has it holds a run
            rows = "".join(json.dumps(row) + "\n" for row in state.log_history)
            write_text(self.directory / METRICS_NAME, rows)

    def on_log(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Append the newest row."""
        if state.is_world_process_zero:
            with (self.directory / METRICS_NAME).open("a", encoding="utf-8") as file:
                file.write(json.dumps(state.log_history[-1]) + "\n")
