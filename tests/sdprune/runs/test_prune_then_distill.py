"""Prune, then distil: two trainings, one call, resumable between and within them."""

import json

import pytest
import torch
from transformers import AutoModelForSequenceClassification, TrainerCallback

import sdprune
from sdprune.config import SDPruneConfig
from sdprune.runs.prune_then_distill import PRUNE_THEN_DISTILL, prune_then_distill

CONFIG = SDPruneConfig(
    target_sparsity=0.5,
    scope="global",
    pruning_steps=2,
    distillation="kl",
    task_weight=0.05,
    distillation_weight=0.95,
    temperature=10.0,
)


@pytest.fixture
def call(model_factory, dataset_factory, tokenizer, arguments, tmp_path):
    """Return a call of `prune_then_distill` on tiny parts, in a folder of its own name."""

    def run(folder="run", resume=False, config=CONFIG, model=None, **options):
        args = arguments(
            output_dir=str(tmp_path / folder),
            resume_from_checkpoint=True if resume else None,
            save_strategy="steps",
            save_steps=4,
        )
        values = {"args": args, "width_multiple": 8, "processing_class": tokenizer} | options
        return prune_then_distill(model or model_factory(), config, dataset_factory(64), **values)

    return run


def test_the_defaults_are_those_of_the_paper():
    assert PRUNE_THEN_DISTILL.target_sparsity == pytest.approx(0.5904)
    assert (PRUNE_THEN_DISTILL.task_weight, PRUNE_THEN_DISTILL.distillation_weight) == (0.05, 0.95)
    assert PRUNE_THEN_DISTILL.temperature == 10.0
    assert sdprune.prune_then_distill is prune_then_distill


def test_a_narrower_stock_model_comes_out(call, dataset_factory, tmp_path):
    seen = []

    class Watch(TrainerCallback):
        def on_log(self, args, state, control, logs=None, **kwargs):
            seen.append((args.output_dir.rsplit("/", 1)[1], logs or {}))

    result = call(
        eval_dataset=dataset_factory(16, seed=1), compute_metrics=lambda prediction: {"x": 1.0}, callbacks=[Watch()]
    )
    assert result.sparsity.linear == 0.5
    assert sum(zeros > 0.5 for zeros in result.sparsity.layers.values()) > 0  # one ranking over all layers
    assert result.model.config.intermediate_size < 64
    assert result.model.config.intermediate_size % 8 == 0
    assert result.metrics["eval_x"] == result.teacher_metrics["eval_x"] == 1.0
    plain = AutoModelForSequenceClassification.from_pretrained(tmp_path / "run" / "student" / "model")
    assert all(torch.equal(value, plain.state_dict()[name]) for name, value in result.model.state_dict().items())
    # the teacher is pruned by its task alone, the student learns from it
    assert not any("loss_kl" in logs for stage, logs in seen if stage == "teacher")
    assert any(logs.get("loss_kl", 0) > 0 for stage, logs in seen if stage == "student")


class StopIn(TrainerCallback):
    """Breaks a stage off after the step that follows its first checkpoint."""

    def __init__(self, stage):
        self.stage = stage

    def on_step_end(self, args, state, control, **kwargs):
        if args.output_dir.endswith(self.stage) and state.global_step == 5:
            raise ConnectionError("broken off")


@pytest.mark.parametrize("stage", ["teacher", "student"])
def test_a_resumed_run_ends_like_an_uninterrupted_one(call, tmp_path, stage):
    whole = call("whole").model.state_dict()
    with pytest.raises(ConnectionError):
        call("broken", callbacks=[StopIn(stage)])
    with pytest.raises(ValueError, match="already holds a run"):
        call("broken")
    with pytest.raises(ValueError, match=r"other settings \(initialization: 'random' -> 'largest'\)"):
        call("broken", resume=True, initialization="largest")
    teacher = tmp_path / "broken" / "teacher" / "stage.json"
    assert teacher.exists() == (stage == "student")
    written = teacher.stat().st_mtime_ns if stage == "student" else None
    resumed = call("broken", resume=True)
    assert written in (None, teacher.stat().st_mtime_ns)  # a finished stage is not repeated
    assert all(torch.equal(value, whole[name]) for name, value in resumed.model.state_dict().items())
    again = call("broken", resume=True)
    assert all(torch.equal(value, whole[name]) for name, value in again.model.state_dict().items())
    assert json.loads((tmp_path / "broken" / "stages.json").read_text())["temperature"] == 10.0


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"config": SDPruneConfig(distillation=None)}, "distillation is None, but the student learns by it"),
        ({"width_multiple": 65}, "width_multiple must lie between 1 and the teacher's feed-forward width 64, got 65"),
        ({"initialization": "best"}, "initialization must be one of 'random', 'largest', got 'best'"),
        ({"resume": True}, "holds no run to resume"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_refused_before_anything_is_written(call, tmp_path, options, message):
    with pytest.raises(ValueError, match=message):
        call(**options)
    assert not list(tmp_path.glob("run/*"))


def test_regression_has_no_kl(call, model_factory):
    with pytest.raises(ValueError, match="the model predicts one number"):
        call(model=model_factory(num_labels=1))
