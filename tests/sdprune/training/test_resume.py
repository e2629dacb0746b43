"""An interrupted run goes on as if nothing had happened."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import TrainerCallback

from sdprune import SDPruneConfig, prune
from sdprune.training.checkpoint import MARKER, checkpoints, remove_incomplete
from sdprune.training.progress import TrainingInterrupted

CONFIG = SDPruneConfig(target_sparsity=0.75, pruning_steps=4, end_ratio=0.75)
SAVING = {
    "save_strategy": "steps",
    "save_steps": 3,
    "max_steps": 12,
    "eval_strategy": "steps",
    "eval_steps": 5,
    "train_sampling_strategy": "group_by_length",
}


class At(TrainerCallback):
    """Does something at the end of a step."""

    def __init__(self, step, action):
        self.step, self.action = step, action

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == self.step:
            self.action()


@pytest.fixture
def go(model_factory, dataset_factory, tokenizer, arguments):
    def run(*callbacks, config=CONFIG, **changes):
        # 44 rows are 5.5 batches an epoch: checkpoints fall into the middle of epochs
        return prune(
            model_factory(),
            config,
            dataset_factory(44),
            dataset_factory(12, seed=1),
            args=arguments(**(SAVING | changes)),
            processing_class=tokenizer,
            callbacks=callbacks,
        )

    return run


@pytest.fixture
def uninterrupted(go, tmp_path):
    return go(output_dir=str(tmp_path / "whole")).model.state_dict()


def same(state, other):
    return state.keys() == other.keys() and all(torch.equal(value, other[name]) for name, value in state.items())


@pytest.mark.parametrize("step", [1, 4, 5, 8, 10])
def test_ctrl_c_finishes_the_step_and_resuming_is_exact(go, uninterrupted, tmp_path, step):
    before = signal.getsignal(signal.SIGINT)  # a shell's background job starts with it ignored
    with pytest.raises(TrainingInterrupted) as interruption:
        go(At(step, lambda: os.kill(os.getpid(), signal.SIGINT)))
    assert interruption.value.checkpoint == tmp_path / "run" / f"checkpoint-{step}"
    assert interruption.value.checkpoint in checkpoints(tmp_path / "run")
    assert signal.getsignal(signal.SIGINT) is before
    result = go(resume_from_checkpoint="latest")
    assert same(result.model.state_dict(), uninterrupted)
    assert set(result.sparsity.layers.values()) == {0.75}


def test_the_log_of_a_resumed_run_has_every_row_once(go, tmp_path):
    whole = go(output_dir=str(tmp_path / "whole"), logging_steps=1).output_dir
    with pytest.raises(TrainingInterrupted):
        go(At(7, lambda: os.kill(os.getpid(), signal.SIGINT)), logging_steps=1)
    resumed = go(resume_from_checkpoint="latest", logging_steps=1).output_dir
    steps = [
        [json.loads(line)["step"] for line in (path / "metrics.jsonl").read_text().splitlines()]
        for path in (whole, resumed)
    ]
    assert steps[0] == steps[1]


def crash():
    raise ConnectionError("the machine went away")


def test_a_half_written_checkpoint_is_passed_over(go, uninterrupted, tmp_path):
    with pytest.raises(ConnectionError):
        go(At(8, crash))
    newest = tmp_path / "run" / "checkpoint-7"
    newest.mkdir()
    (newest / "model.safetensors").write_bytes(b"half")
    assert [path.name for path in checkpoints(tmp_path / "run")] == ["checkpoint-3", "checkpoint-6"]
    assert same(go(resume_from_checkpoint="latest").model.state_dict(), uninterrupted)
    assert not newest.exists()


def test_a_killed_process_resumes_exactly(tmp_path):
    """kill -9, and the same script again."""
    script = Path(__file__).with_name("killed_run.py")
    command = [sys.executable, str(script)]
    killed = subprocess.run([*command, str(tmp_path / "run"), "--kill-at", "8"], check=False, capture_output=True)
    assert killed.returncode == -signal.SIGKILL, killed.stderr.decode()
    again = subprocess.run([*command, str(tmp_path / "run"), "--resume"], check=False, capture_output=True)
    assert again.returncode == 0, again.stderr.decode()
    whole = subprocess.run([*command, str(tmp_path / "whole")], check=False, capture_output=True)
    assert whole.returncode == 0, whole.stderr.decode()
    assert again.stdout == whole.stdout
    assert len(again.stdout.strip()) == 64


def test_resuming_checks_what_it_finds(go, tmp_path):
    with pytest.raises(ValueError, match="holds no run to resume"):
        go(resume_from_checkpoint="latest")
    with pytest.raises(ConnectionError):
        go(At(5, crash))
    other = SDPruneConfig(target_sparsity=0.7, pruning_steps=4, end_ratio=0.75)
    with pytest.raises(ValueError, match=r"another configuration \(target_sparsity: 0\.75 -> 0\.7\)"):
        go(config=other, resume_from_checkpoint="latest")
    (tmp_path / "run" / "checkpoint-3" / MARKER).unlink()
    with pytest.raises(ValueError, match="is no whole checkpoint"):
        go(resume_from_checkpoint=str(tmp_path / "run" / "checkpoint-3"))


def test_without_a_whole_checkpoint_the_run_begins_again(go, uninterrupted, caplog):
    with pytest.raises(ConnectionError):
        go(At(1, crash))
    assert same(go(resume_from_checkpoint="latest").model.state_dict(), uninterrupted)
    assert "holds no whole checkpoint" in caplog.text


def test_remove_incomplete_keeps_the_whole_ones(tmp_path):
    for name in ("checkpoint-2", "checkpoint-10"):
        (tmp_path / name).mkdir()
        (tmp_path / name / MARKER).write_text("{}")
    (tmp_path / "checkpoint-12").mkdir()
    remove_incomplete(tmp_path)
    assert [path.name for path in checkpoints(tmp_path)] == ["checkpoint-2", "checkpoint-10"]
    assert not (tmp_path / "checkpoint-12").exists()
