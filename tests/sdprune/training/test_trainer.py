"""`SDPruneTrainer`: what it adds to the loss, and what it must not change."""

import pytest
import torch
from torch import nn
from transformers import Trainer, TrainerCallback

from sdprune import OBJECTIVES, Objective, SDPruneCallback, SDPruneConfig, SDPruneTrainer
from sdprune.data.sampler import LengthBucketSampler
from sdprune.distillation.teacher import Teacher
from sdprune.masking.pruner import mask_model, prune_step

NO_PRUNING = {"target_sparsity": 0.0, "pruning_steps": 1}


def make_trainer(model, args, dataset, tokenizer, *, teacher=None, callbacks=(), **fields):
    config = SDPruneConfig(**(NO_PRUNING | fields))
    return SDPruneTrainer(
        model,
        args,
        config=config,
        train_dataset=dataset,
        eval_dataset=dataset,
        processing_class=tokenizer,
        teacher_model=teacher,
        callbacks=[SDPruneCallback(config), *callbacks],
    )


@pytest.mark.parametrize("distillation", [None, "kl", "cosine"])
def test_accumulated_batches_equal_one_large_batch(
    model_factory, dataset_factory, tokenizer, arguments, tmp_path, distillation
):
    """4 x 8 against 1 x 32: transformers scales the loss of models that take **kwargs, but not a distillation term."""
    states = []
    for name, size, accumulation in (("small", 8, 4), ("large", 32, 1)):
        args = arguments(
            output_dir=str(tmp_path / name),
            per_device_train_batch_size=size,
            gradient_accumulation_steps=accumulation,
            max_steps=3,
            optim="sgd",
            learning_rate=0.1,
            max_grad_norm=0.0,
            train_sampling_strategy="sequential",
        )
        model = model_factory(hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)
        teacher = model_factory(seed=1)
        make_trainer(
            model,
            args,
            dataset_factory(96),
            tokenizer,
            teacher=teacher,
            distillation=distillation,
            representation="first",
        ).train()
        states.append(model.state_dict())
    for name, value in states[0].items():
        torch.testing.assert_close(value, states[1][name], rtol=2e-4, atol=2e-6)


def test_cross_correlation_is_per_micro_batch(model_factory, dataset_factory, tokenizer, arguments, monkeypatch):
    rows = []

    def count(comparison):
        rows.append(len(comparison.student))
        return comparison.student.sum() * 0.0

    monkeypatch.delitem(OBJECTIVES, "cross_correlation")
    monkeypatch.setitem(OBJECTIVES, "cross_correlation", Objective(count))
    args = arguments(per_device_train_batch_size=4, gradient_accumulation_steps=2, max_steps=2)
    fields = {"distillation": "cross_correlation", "representation": "first"}  # one row an example
    make_trainer(model_factory(), args, dataset_factory(32), tokenizer, **fields).train()
    assert rows == [4, 4, 4, 4]


def test_evaluation_knows_no_teacher(model_factory, dataset_factory, tokenizer, arguments):
    trainer = make_trainer(model_factory(), arguments(), dataset_factory(24), tokenizer, distillation="kl")
    plain = Trainer(model_factory(), arguments(), eval_dataset=dataset_factory(24), processing_class=tokenizer)

    def refuse(inputs, names):
        raise AssertionError("the teacher ran in evaluation")

    trainer.teacher = refuse
    assert trainer.evaluate()["eval_loss"] == pytest.approx(plain.evaluate()["eval_loss"])
    prediction = trainer.predict(dataset_factory(24)).predictions
    assert prediction.shape == (24, 2)  # logits alone, no hidden states


def test_the_teacher_gets_no_labels_and_stays_in_eval_mode(model, batch):
    teacher = Teacher(model, copy_model=True)
    seen = {}
    teacher.model.register_forward_pre_hook(lambda m, a, k: seen.update(k), with_kwargs=True)
    teacher.model.train()
    first = teacher(batch, ["logits", "tokens", "pooled"])
    assert not teacher.model.training
    assert "labels" not in seen
    assert torch.equal(first["logits"], teacher(batch, ["logits"])["logits"])  # no dropout
    assert not first["logits"].requires_grad
    assert first["tokens"].shape == (*batch["input_ids"].shape, 32)
    assert first["pooled"].shape == (16, 32)


def test_the_teacher_is_no_part_of_the_student(model_factory, dataset_factory, tokenizer, arguments):
    model = model_factory()
    names = set(dict(model.named_parameters()))
    trainer = make_trainer(model, arguments(), dataset_factory(24), tokenizer, distillation="kl")
    assert set(dict(trainer.model.named_parameters())) == names
    assert not set(map(id, trainer.model.parameters())) & set(map(id, trainer.teacher.model.parameters()))


def test_no_unpruned_copy_of_a_pruned_model(model_factory, dataset_factory, tokenizer, arguments):
    model = model_factory()
    mask_model(model, SDPruneConfig())
    prune_step(model, SDPruneConfig(), 0.5)
    with pytest.raises(ValueError, match=r"teacher_model is None and the model is pruned already \(sparsity 0\.5000\)"):
        make_trainer(model, arguments(), dataset_factory(24), tokenizer, distillation="kl")


@pytest.mark.parametrize("part", ["task", "kl"])
def test_a_loss_that_is_not_finite_is_named(model_factory, dataset_factory, tokenizer, arguments, part):
    model, teacher = model_factory(), model_factory(1)
    with torch.no_grad():
        (model if part == "task" else teacher).classifier.weight.fill_(torch.nan)
    trainer = make_trainer(model, arguments(), dataset_factory(24), tokenizer, teacher=teacher, distillation="kl")
    with pytest.raises(FloatingPointError, match=rf"the {part} loss is nan at step 1; lower learning_rate"):
        trainer.train()


def test_logged_loss_is_the_weighted_sum(model_factory, dataset_factory, tokenizer, arguments):
    rows = []

    class Keep(TrainerCallback):
        def on_log(self, args, state, control, logs=None, **kwargs):
            rows.append(dict(logs))

    trainer = make_trainer(
        model_factory(),
        arguments(),
        dataset_factory(64),
        tokenizer,
        teacher=model_factory(1),
        callbacks=[Keep()],
        distillation={"kl": 0.5, "cosine": 2.0},
        distillation_weight=3.0,
    )
    trainer.train()
    rows = [row for row in rows if "loss" in row]
    assert len(rows) == 4
    for row in rows:  # seen by a user's callback, so added before the callbacks ran
        expected = row["loss_task"] + 3.0 * (0.5 * row["loss_kl"] + 2.0 * row["loss_cosine"])
        assert row["loss"] == pytest.approx(expected, rel=1e-4)
        assert row["sparsity"] == 0.0


def test_length_grouping_resumes_and_evaluation_keeps_its_order(model_factory, dataset_factory, tokenizer, arguments):
    args = arguments(train_sampling_strategy="group_by_length")
    dataset = dataset_factory(40)
    trainer = make_trainer(model_factory(), args, dataset, tokenizer)
    assert isinstance(trainer._get_train_sampler(), LengthBucketSampler)
    prediction = trainer.predict(dataset)
    assert prediction.label_ids.tolist() == list(dataset.labels)


def test_a_plain_trainer_can_prune(model_factory, dataset_factory, tokenizer, arguments):
    config = SDPruneConfig(target_sparsity=0.5, pruning_steps=2, distillation=None)
    model = model_factory()
    Trainer(
        model,
        arguments(),
        train_dataset=dataset_factory(64),
        processing_class=tokenizer,
        callbacks=[SDPruneCallback(config)],
    ).train()
    zeros = [
        float((layer.weight == 0).float().mean())
        for layer in model.modules()
        if type(layer) is not nn.Linear and isinstance(layer, nn.Linear)
    ]
    assert zeros == [0.5] * 12
