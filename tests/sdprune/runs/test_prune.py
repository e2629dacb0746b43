"""`prune`: the loop end to end on a tiny model."""

import json

import pytest
import torch
from transformers import TrainerCallback

from sdprune import SDPruneConfig, prune
from sdprune.masking.swap import masked_layers

SCHEDULE = {"schedule": "cubic", "pruning_steps": 4, "end_ratio": 0.75}


def accuracy(prediction):
    return {"accuracy": float((prediction.predictions.argmax(1) == prediction.label_ids).mean())}


@pytest.mark.parametrize("structure", ["unstructured", "block"])
@pytest.mark.parametrize("scope", ["layer", "global"])
@pytest.mark.parametrize(
    "distillation", [None, "cross_correlation", "kl", "cosine", {"kl": 0.5, "cross_correlation": 1.0}]
)
def test_every_combination_reaches_its_target(
    model_factory, dataset_factory, tokenizer, arguments, structure, scope, distillation
):
    config = SDPruneConfig(
        target_sparsity=0.75,
        structure=structure,
        block_shape=(8, 8),
        scope=scope,
        distillation=distillation,
        **SCHEDULE,
    )
    result = prune(model_factory(), config, dataset_factory(64), args=arguments(), processing_class=tokenizer)
    unit = 64 if structure == "block" else 1
    if scope == "global":
        assert abs(result.sparsity.zeros - 0.75 * result.sparsity.prunable) <= unit / 2
    else:
        assert set(result.sparsity.layers.values()) == {0.75}
    assert (result.teacher is None) == (distillation is None)
    assert not masked_layers(result.model)


def test_the_result_tells_what_happened(model_factory, dataset_factory, tokenizer, arguments):
    config = SDPruneConfig(target_sparsity=0.5, distillation={"cross_correlation": 1.0, "cosine": 1.0}, **SCHEDULE)
    args = arguments(eval_strategy="steps", eval_steps=4)
    result = prune(
        model_factory(),
        config,
        dataset_factory(64),
        dataset_factory(24, seed=1),
        args=args,
        processing_class=tokenizer,
        compute_metrics=accuracy,
    )
    assert 0.0 <= result.metrics["eval_accuracy"] <= 1.0
    rows = [json.loads(line) for line in (result.output_dir / "metrics.jsonl").read_text().splitlines()]
    training = [row for row in rows if "loss" in row]
    assert [row["step"] for row in training] == [2, 4, 6, 8]
    assert [row["sparsity"] for row in training] == sorted(row["sparsity"] for row in training)
    assert training[-1]["sparsity"] == pytest.approx(0.5, abs=1e-4)
    for row in training:
        assert row["loss"] == pytest.approx(
            row["loss_task"] + row["loss_cross_correlation"] + row["loss_cosine"], rel=1e-4
        )
    assert sum("eval_accuracy" in row for row in rows) >= 2
    assert SDPruneConfig.from_pretrained(result.output_dir) == config


def test_the_teacher_is_frozen_and_unpruned(model_factory, dataset_factory, tokenizer, arguments):
    before = {name: value.clone() for name, value in model_factory().state_dict().items()}

    class Watch(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            assert kwargs["model"].training

    config = SDPruneConfig(target_sparsity=0.5, **SCHEDULE)
    result = prune(
        model_factory(), config, dataset_factory(64), args=arguments(), processing_class=tokenizer, callbacks=[Watch()]
    )
    assert not result.teacher.training
    assert not any(parameter.requires_grad for parameter in result.teacher.parameters())
    for name, value in result.teacher.state_dict().items():
        assert torch.equal(value, before[name])


def test_seeded_runs_repeat_to_the_bit(model_factory, dataset_factory, tokenizer, arguments, tmp_path):
    config = SDPruneConfig(target_sparsity=0.5, **SCHEDULE)
    states = [
        prune(
            model_factory(),
            config,
            dataset_factory(64),
            args=arguments(output_dir=str(tmp_path / name), train_sampling_strategy="group_by_length"),
            processing_class=tokenizer,
        ).model.state_dict()
        for name in "ab"
    ]
    for name, value in states[0].items():
        assert torch.equal(value, states[1][name])


def test_a_training_that_stops_early_still_reaches_the_target(
    model_factory, dataset_factory, tokenizer, arguments, caplog
):
    class Stop(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            control.should_training_stop = state.global_step == 3

    config = SDPruneConfig(target_sparsity=0.75, **SCHEDULE)
    result = prune(
        model_factory(), config, dataset_factory(64), args=arguments(), processing_class=tokenizer, callbacks=[Stop()]
    )
    assert set(result.sparsity.layers.values()) == {0.75}
    assert "training ended at step 3 of 8" in caplog.text


def test_an_occupied_folder_is_left_alone(model_factory, dataset_factory, tokenizer, arguments):
    config = SDPruneConfig(target_sparsity=0.5, **SCHEDULE)
    prune(model_factory(), config, dataset_factory(64), args=arguments(), processing_class=tokenizer)
    with pytest.raises(ValueError, match="already holds a run"):
        prune(model_factory(), config, dataset_factory(64), args=arguments(), processing_class=tokenizer)


def test_checkpoints_of_others_are_left_alone(model_factory, dataset_factory, tokenizer, arguments, tmp_path):
    foreign = tmp_path / "run" / "checkpoint-500" / "model.safetensors"
    foreign.parent.mkdir(parents=True)
    foreign.write_bytes(b"mine")
    with pytest.raises(ValueError, match="already holds a run"):
        prune(model_factory(), SDPruneConfig(pruning_steps=99), dataset_factory(64), args=arguments())
    assert foreign.read_bytes() == b"mine"


@pytest.mark.parametrize(
    ("fields", "sizes", "message"),
    [
        ({"distillation": "kl"}, {"num_labels": 1}, "the model predicts one number"),
        ({"distillation": "cosine", "representation": "pooled"}, {}, "the model has no pooler; choose"),
    ],
)
def test_objectives_that_do_not_fit_are_refused_early(
    model_factory, dataset_factory, tokenizer, arguments, tmp_path, fields, sizes, message
):
    model = model_factory(**sizes)
    if not sizes:
        model.bert.pooler = None
    with pytest.raises(ValueError, match=message):
        prune(model, SDPruneConfig(**SCHEDULE, **fields), dataset_factory(64), args=arguments())
    assert not list((tmp_path / "run").glob("*"))


def test_a_refused_run_leaves_the_folder_free(model_factory, dataset_factory, tokenizer, arguments, tmp_path):
    long = SDPruneConfig(pruning_steps=32)
    with pytest.raises(ValueError, match="pruning_steps=32 do not fit: the training has 8 steps"):
        prune(model_factory(), long, dataset_factory(64), args=arguments(), processing_class=tokenizer)
    assert not (tmp_path / "run").exists()


def test_another_teacher_is_used_and_checked(model_factory, dataset_factory, tokenizer, arguments):
    config = SDPruneConfig(target_sparsity=0.5, distillation="kl", **SCHEDULE)
    with pytest.raises(ValueError, match="teacher_model has 3 classes, the model has 2"):
        prune(
            model_factory(), config, dataset_factory(64), args=arguments(), teacher_model=model_factory(1, num_labels=3)
        )
    model = model_factory()
    with pytest.raises(ValueError, match="teacher_model is the model itself"):
        prune(model, config, dataset_factory(64), args=arguments(), teacher_model=model)
    teacher = model_factory(1)
    result = prune(
        model_factory(),
        config,
        dataset_factory(64),
        args=arguments(),
        processing_class=tokenizer,
        teacher_model=teacher.train(),
    )
    assert result.teacher is teacher
    assert not teacher.training
