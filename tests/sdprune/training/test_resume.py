"""An interrupted run goes on as if nothing had happened."""

import copy
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from transformers import TrainerCallback

from sdp_kernels import BitMask
from sdprune import SDPruneConfig, prune
from sdprune.training.checkpoint import MARKER, checkpoints, remove_incomplete
from sdprune.training.origin import rows_fingerprint
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
    """kill -9, and the same script again; `killed_run.py` says how to run more of these."""
    script = Path(__file__).with_name("killed_run.py")
    command = [sys.executable, str(script), str(tmp_path), "--kills", "4", "--seed", "7"]
    process = subprocess.run(command, check=False, capture_output=True, text=True)
    assert process.returncode == 0, process.stderr
    rows = [json.loads(line) for line in process.stdout.splitlines()]
    assert len(rows) == 4
    assert all(row["same"] for row in rows), rows
    assert any(row["left"] != row["whole"] for row in rows), "no kill struck within a save: choose another seed"


def test_resuming_checks_what_it_finds(go, tmp_path):
    with pytest.raises(ValueError, match="holds no run to resume"):
        go(resume_from_checkpoint="latest")
    with pytest.raises(ConnectionError):
        go(At(5, crash))
    other = SDPruneConfig(target_sparsity=0.7, pruning_steps=4, end_ratio=0.75)
    with pytest.raises(ValueError, match=r"another configuration \(target_sparsity: 0\.75 -> 0\.7\)"):
        go(config=other, resume_from_checkpoint="latest")
    with pytest.raises(ValueError, match=r"other training arguments \(training\.learning_rate: 0\.001 -> 0\.002\)"):
        go(resume_from_checkpoint="latest", learning_rate=2e-3)
    (tmp_path / "run" / "checkpoint-3" / MARKER).unlink()
    with pytest.raises(ValueError, match="is no whole checkpoint"):
        go(resume_from_checkpoint=str(tmp_path / "run" / "checkpoint-3"))


def test_other_rows_and_other_models_are_refused(model_factory, dataset_factory, tokenizer, arguments):
    def go(model, dataset, *callbacks, teacher_model=None, **changes):
        args = arguments(**(SAVING | changes))
        tools = {"processing_class": tokenizer, "teacher_model": teacher_model}
        return prune(model, CONFIG, dataset, args=args, callbacks=callbacks, **tools)

    with pytest.raises(ConnectionError):
        go(model_factory(), dataset_factory(44), At(5, crash), eval_strategy="no")
    resume = {"resume_from_checkpoint": "latest", "eval_strategy": "no"}
    with pytest.raises(ValueError, match=r"another train_dataset \(data\.rows: 44 -> 45; data\.digest: "):
        go(model_factory(), dataset_factory(45), **resume)
    with pytest.raises(ValueError, match=r"another train_dataset \(data\.digest: '\w+' -> '\w+'\)"):
        go(model_factory(), dataset_factory(44, seed=9), **resume)
    with pytest.raises(ValueError, match=r"another model \(build the dense one again.*\(model\.digest: "):
        go(model_factory(seed=5), dataset_factory(44), **resume)
    with pytest.raises(ValueError, match=r"another teacher_model \(teacher: None -> \{'class'"):
        go(model_factory(), dataset_factory(44), teacher_model=model_factory(seed=5), **resume)
    assert go(model_factory(), dataset_factory(44), **resume).sparsity.linear == 0.75


def test_a_checkpoint_of_another_run_is_refused(go, tmp_path):
    for name, config in (("other", SDPruneConfig(target_sparsity=0.5, pruning_steps=4)), ("run", CONFIG)):
        with pytest.raises(ConnectionError):
            go(At(5, crash), config=config, output_dir=str(tmp_path / name))
    with pytest.raises(ValueError, match=r"checkpoint-3' has another configuration \(target_sparsity: 0\.5 -> 0\.75"):
        go(resume_from_checkpoint=str(tmp_path / "other" / "checkpoint-3"))


def test_checkpoints_hold_their_zeros_in_the_weights(go, tmp_path):
    with pytest.raises(ConnectionError):
        go(At(8, crash), weight_decay=0.1)
    state = load_file(tmp_path / "run" / "checkpoint-6" / "model.safetensors")
    masks = [name for name in state if name.endswith(".mask")]
    assert len(masks) == 12
    for name in masks:
        weight = state[name.removesuffix("mask") + "weight"]
        pruned = ~BitMask(state[name], tuple(weight.shape)).to_bool()
        assert float(pruned.float().mean()) == pytest.approx(0.5, abs=1e-3)
        assert bool((weight[pruned] == 0).all())


def test_rows_that_change_each_time_have_no_digest():
    class Noisy(list):
        def __getitem__(self, index):
            return {"values": torch.rand(2)}

    assert rows_fingerprint(Noisy([0, 0])) == {"rows": 2, "columns": ["values"], "digest": None}
    assert rows_fingerprint(iter([{}])) == {"rows": None, "columns": None, "digest": None}
    rows = [{"a": torch.tensor([1.0]), "b": "x"}, {"a": np.ones(2), "b": [1, 2]}]
    assert rows_fingerprint(rows)["digest"] == rows_fingerprint(copy.deepcopy(rows))["digest"]
    assert rows_fingerprint(rows)["digest"] != rows_fingerprint([rows[0], {"a": np.ones(2), "b": [1, 3]}])["digest"]


def test_without_a_whole_checkpoint_the_run_begins_again(go, uninterrupted, caplog):
    with pytest.raises(ConnectionError):
        go(At(1, crash))
    assert same(go(resume_from_checkpoint="latest").model.state_dict(), uninterrupted)
    assert "holds no whole checkpoint" in caplog.text


def test_remove_incomplete_keeps_the_whole_ones(tmp_path):
    marker = {"files": {"model.safetensors": 3}, "origin": {}}
    for name, content in {"checkpoint-2": b"abc", "checkpoint-10": b"abc", "checkpoint-11": b"ab"}.items():
        (tmp_path / name).mkdir()
        (tmp_path / name / MARKER).write_text(json.dumps(marker))
        (tmp_path / name / "model.safetensors").write_bytes(content)
    (tmp_path / "checkpoint-12").mkdir()
    (tmp_path / "checkpoint-13").mkdir()
    (tmp_path / "checkpoint-13" / MARKER).write_text("{half")
    (tmp_path / "checkpoint-best").mkdir()
    remove_incomplete(tmp_path)
    kept = ["checkpoint-2", "checkpoint-10"]
    assert [path.name for path in checkpoints(tmp_path)] == kept
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted([*kept, "checkpoint-best"])
