"""Distillation inside a training: the teacher's cache, what resumes, what is refused before the first step."""

import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel, TrainerCallback

from sdprune import SDPruneCallback, SDPruneConfig, SDPruneTrainer
from sdprune.data.examples import EncodedExamples
from sdprune.distillation.steering import gradient_norm

QUIET = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}


class Keep(TrainerCallback):
    """Keeps the rows of the log."""

    def __init__(self):
        self.rows = []

    def on_log(self, args, state, control, logs=None, **kwargs):
        self.rows.append(dict(logs))


class Stop(TrainerCallback):
    def __init__(self, step):
        self.step = step

    def on_step_end(self, args, state, control, **kwargs):
        control.should_training_stop = state.global_step == self.step


@pytest.fixture
def make(model_factory, dataset_factory, tokenizer, arguments):
    def make(model=None, dataset=None, teacher=None, callbacks=(), args=(), **fields):
        config = SDPruneConfig(**({"target_sparsity": 0.5, "pruning_steps": 2} | fields))
        return SDPruneTrainer(
            model_factory(**QUIET) if model is None else model,
            arguments(**dict(args)),
            config=config,
            train_dataset=dataset_factory(40) if dataset is None else dataset,
            processing_class=tokenizer,
            teacher_model=teacher,
            callbacks=[SDPruneCallback(config), *callbacks],
        )

    return make


def forwards(trainer):
    """Count the forward passes of the teacher from now on."""
    calls = []
    trainer.teacher.model.register_forward_hook(lambda *_: calls.append(1))
    return calls


def losses(trainer):
    keep = Keep()
    trainer.add_callback(keep)
    trainer.train()
    return [{k: v for k, v in row.items() if k.startswith("loss")} for row in keep.rows if "loss" in row]


@pytest.mark.parametrize("representation", ["first", "mean", "tokens", "logits"])
def test_the_cache_changes_no_loss_and_spares_the_teacher(make, model_factory, tmp_path, representation):
    fields = {
        "distillation": {"cross_correlation": 0.5, "kl": 1.0, "mse": 0.1},
        "representation": representation,
        "args": {
            "gradient_accumulation_steps": 2,
            "per_device_train_batch_size": 4,
            "logging_steps": 1,
            "optim": "sgd",  # Adam makes steps of full length out of gradients that are rounding alone
            "learning_rate": 1e-3,
        },
    }
    # rows of a model with larger weights differ by more than their rounding, also after their mean is subtracted
    student, teacher = ({"seed": seed, "initializer_range": 0.3} | QUIET for seed in (0, 1))
    live = make(model_factory(**student), teacher=model_factory(**teacher), **fields)
    calls = forwards(live)
    expected = losses(live)
    assert len(calls) == 16
    fields["teacher"] = model_factory(**teacher)
    cold = make(model_factory(**student), teacher_cache=str(tmp_path / "cache"), **fields)
    assert not (tmp_path / "cache").exists()
    calls = forwards(cold)
    found = [losses(cold)]
    assert len(calls) == 10  # 40 examples in batches of 4, before the first step
    fields["teacher"] = model_factory(**teacher)
    warm = make(model_factory(**student), teacher_cache=str(tmp_path / "cache"), **fields)
    calls = forwards(warm)
    found.append(losses(warm))
    assert calls == []
    for rows in found:
        assert len(rows) == len(expected) == 8
        for row, other in zip(rows, expected, strict=True):
            assert row == pytest.approx(other, rel=1e-6, abs=1e-6)


def test_terms_of_different_representations_are_logged_cached_and_steered(make, model_factory, tmp_path):
    weights = {
        "cross_correlation@first": 0.5,
        "mse": 0.1,
        "mse@logits": 2.0,
        "cosine@mean@1": 1.0,
        "cosine@pooled": 1.0,
    }
    fields = {
        "distillation": weights,
        "gradient_ratio": 0.5,
        "gradient_ratio_steps": 2,
        "args": {"logging_steps": 1, "optim": "sgd", "learning_rate": 1e-3},
    }
    logged, wide = [], {"initializer_range": 0.3} | QUIET
    for cache in (None, str(tmp_path / "cache")):
        keep, teacher = Keep(), model_factory(1, **wide)
        trainer = make(model_factory(**wide), teacher=teacher, callbacks=[keep], teacher_cache=cache, **fields)
        trainer.train()
        logged.append([row for row in keep.rows if "loss" in row])
    held = {path.stem for path in (tmp_path / "cache").glob("*.npy")} - {"keys", "lengths"}
    assert held == {"first", "tokens", "logits", "mean@1", "pooled"}
    for row, other in zip(*logged, strict=True):
        assert {f"loss_{name}" for name in weights} < set(row)
        distillation = sum(weight * row[f"loss_{name}"] for name, weight in weights.items())
        assert row["loss"] == pytest.approx(row["loss_task"] + row["distillation_weight"] * distillation, rel=1e-3)
        for name in weights:
            assert other[f"loss_{name}"] == pytest.approx(row[f"loss_{name}"], rel=1e-5, abs=1e-6)
    assert len({row["distillation_weight"] for row in logged[0]}) > 1


def test_evaluation_and_prediction_know_no_cache(make, dataset_factory, tmp_path):
    trainer = make(distillation="kl", teacher_cache=str(tmp_path / "cache"))
    trainer.train()
    assert trainer.predict(dataset_factory(8)).predictions.shape == (8, 2)
    assert "eval_loss" in trainer.evaluate(dataset_factory(8))


def test_a_cache_needs_something_to_keep(make, tmp_path):
    for distillation in (None, "aligned_cosine"):
        with pytest.raises(ValueError, match="has nothing to keep"):
            make(distillation=distillation, teacher_cache=str(tmp_path / "cache"))
    assert not (tmp_path / "cache").exists()


def test_aligned_weights_need_no_forward_pass_of_the_teacher(make):
    trainer = make(distillation={"aligned_cosine": 1.0, "aligned_frobenius": 1.0})
    calls = forwards(trainer)
    rows = losses(trainer)
    assert calls == []
    assert rows[0]["loss_aligned_cosine"] > 0  # pruned at the first step
    assert rows[-1]["loss_aligned_frobenius"] > rows[0]["loss_aligned_frobenius"]


@pytest.mark.parametrize(
    "fields",
    [
        {"queue_size": 24, "distillation": {"cross_correlation@first": 1.0, "cross_correlation@mean@1": 1.0}},
        {"gradient_ratio": 0.5, "gradient_ratio_steps": 2, "distillation": "kl"},
    ],
    ids=["queue", "steering"],
)
def test_what_the_losses_remember_is_resumed_exactly(make, model_factory, tmp_path, fields):
    args = {"save_strategy": "steps", "save_steps": 3, "optim": "sgd", "learning_rate": 0.05, "logging_steps": 1}
    weights, logged = [], []
    for name, stops in (("whole", [8]), ("parts", [3, 8])):
        resume = None
        for stop in stops:
            keep, model = Keep(), model_factory(**QUIET)
            trainer = make(
                model, callbacks=[Stop(stop), keep], args=args | {"output_dir": str(tmp_path / name)}, **fields
            )
            # the first stop ends the training before the target: only its checkpoint counts
            trainer.train(resume_from_checkpoint=resume)
            resume = str(tmp_path / name / "checkpoint-3")
        weights.append(model.state_dict())
        logged.append([row for row in keep.rows if "loss" in row][-5:])
    for name, value in weights[0].items():
        assert torch.equal(value, weights[1][name]), name
    assert logged[0] == logged[1] or [r["loss"] for r in logged[0]] == [r["loss"] for r in logged[1]]


def test_steering_keeps_the_ratio_of_the_gradients(make, model_factory, dataset_factory, tokenizer):
    trainer = make(
        teacher=model_factory(1),
        distillation="kl",
        gradient_ratio=0.3,
        gradient_ratio_steps=1,
        distillation_weight=0.01,
        args={"max_steps": 20, "learning_rate": 1e-5, "logging_steps": 1},
        target_sparsity=0.0,
        pruning_steps=1,
    )
    measured = []
    original = trainer._steer

    def measure(task, distillation):
        original(task, distillation)
        parameters = [each for each in trainer.model.parameters() if each.requires_grad]
        norms = [gradient_norm(loss, parameters).item() for loss in (task, distillation)]
        measured.append(trainer.distillation_weight * norms[1] / norms[0])

    trainer._steer = measure
    keep = Keep()
    trainer.add_callback(keep)
    trainer.train()
    assert measured[0] < 0.1
    assert measured[-1] == pytest.approx(0.3)
    assert [row["distillation_weight"] for row in keep.rows if "loss" in row][-1] == trainer.distillation_weight


def without_labels(dataset):
    class Unlabelled(EncodedExamples):
        def __getitem__(self, row):
            return {name: column[row] for name, column in self.columns.items()}

    return Unlabelled(dataset.columns, dataset.labels)


def test_a_task_loss_needs_labels(make, dataset_factory):
    dataset = without_labels(dataset_factory(24))
    with pytest.raises(
        ValueError,
        match="the task loss needs labels, but the training data give only attention_mask, input_ids, token_type_ids; "
        "add a column labels, or set task_weight=0",
    ):
        make(dataset=dataset, distillation="kl")
    rows = losses(make(dataset=dataset, distillation="kl", task_weight=0.0))
    assert set(rows[0]) == {"loss", "loss_kl"}


def test_logged_parts_of_a_model_in_bfloat16_are_means(make):
    """Their sum over 400 micro-batches is not taken in bfloat16, which holds no odd number above 256."""
    trainer = make(distillation=None)
    for _ in range(400):
        trainer._record({"task": torch.tensor(0.75, dtype=torch.bfloat16)})
    logs = {"loss": 0.75}
    trainer.log(logs)
    assert logs["loss_task"] == 0.75


def test_the_task_weight_is_used(make):
    light, heavy = (losses(make(distillation=None, task_weight=weight))[0] for weight in (1.0, 3.0))
    assert light["loss"] == pytest.approx(light["loss_task"])
    assert heavy["loss"] == pytest.approx(3.0 * heavy["loss_task"])


@pytest.mark.parametrize(
    ("changes", "fields", "message"),
    [
        ({"vocab_size": 99}, {"distillation": "kl"}, "teacher_model has a vocabulary of 99, the model has a vocab"),
        ({"num_labels": 3}, {"distillation": "kl"}, "teacher_model has 3 classes, the model has 2 classes"),
        ({"hidden_size": 16}, {"distillation": "mse"}, "teacher_model has hidden states of width 16, the model has"),
        (
            {"intermediate_size": 32},
            {"distillation": "aligned_cosine"},
            r"layer\.0\.intermediate\.dense\.weight has shape \(64, 32\) in the model, shape \(32, 32\) in teacher",
        ),
        ({"num_hidden_layers": 1}, {"distillation": "aligned_cosine"}, r"layer\.1\..* no such weight in teacher_model"),
        (
            {"num_hidden_layers": 1},
            {"hidden_layers": (2,), "representation": "mean"},
            r"hidden_layers must lie in \[-2, 1\] for teacher_model with its 1 layers, got \[2\]",
        ),
        (
            {"num_hidden_layers": 1},
            {"distillation": {"kl": 1.0, "mse@mean@2": 1.0}},
            r"'mse@mean@2': the hidden state must lie in \[-2, 1\] for teacher_model with its 1 layers, got \[2\]",
        ),
        (
            {"hidden_size": 16},
            {"distillation": {"mse@first": 1.0}, "representation": "logits"},
            "teacher_model has hidden states of width 16, the model has",
        ),
        ({"num_labels": 3}, {"distillation": "mse@logits"}, "teacher_model has 3 classes, the model has 2 classes"),
    ],
)
def test_teachers_that_do_not_fit_are_refused(make, model_factory, changes, fields, message):
    with pytest.raises(ValueError, match=message):
        make(teacher=model_factory(**changes), **fields)


def test_a_teacher_names_its_classes_in_the_order_of_the_model(make, model_factory):
    def named(seed, *names):
        return model_factory(seed, id2label=dict(enumerate(names)), label2id={name: i for i, name in enumerate(names)})

    with pytest.raises(
        ValueError, match=r"classes in another order \(good, bad\) than the model \(bad, good\); logits"
    ):
        make(named(0, "bad", "good"), teacher=named(1, "Good", "Bad"), distillation="kl")
    for names in (("Bad", "Good"), ("LABEL_0", "LABEL_1")):
        assert make(named(0, "bad", "good"), teacher=named(1, *names), distillation="kl").teacher is not None
    assert make(named(0, "bad", "good"), teacher=named(1, "good", "bad"), distillation="mse").teacher is not None


def test_a_teacher_may_be_narrower_where_logits_alone_are_compared(make, model_factory):
    rows = losses(make(teacher=model_factory(hidden_size=16, num_hidden_layers=1), distillation="kl"))
    assert rows[0]["loss_kl"] > 0


@pytest.mark.parametrize(
    ("changes", "fields", "message"),
    [
        ({"num_labels": 1}, {"distillation": "kl"}, "the model predicts one number; take 'mse' with representation"),
        (
            {"problem_type": "multi_label_classification"},
            {"distillation": "kl"},
            "the model predicts several labels at once; take 'mse'",
        ),
        ({}, {"hidden_layers": (1, 3), "representation": "mean"}, r"hidden_layers must lie in \[-3, 2\].*got \[3\]"),
    ],
)
def test_objectives_that_do_not_fit_are_refused(make, model_factory, changes, fields, message):
    with pytest.raises(ValueError, match=message):
        make(model_factory(**changes), **fields)


def test_chosen_layers_and_a_teacher_in_bfloat16(make):
    trainer = make(
        distillation={"cosine": 1.0, "kl": 1.0}, representation="mean", hidden_layers=(1, -1), teacher_dtype="bfloat16"
    )
    assert {parameter.dtype for parameter in trainer.teacher.model.parameters()} == {torch.bfloat16}
    assert {parameter.dtype for parameter in trainer.model.parameters()} == {torch.float32}
    assert all(0 < row["loss_cosine"] < 0.5 for row in losses(trainer))


def test_regression_learns_from_the_number(make, model_factory, dataset_factory):
    dataset = dataset_factory(24)
    numbers = EncodedExamples(dataset.columns, [float(label) for label in dataset.labels])
    rows = losses(
        make(
            model_factory(num_labels=1),
            numbers,
            model_factory(1, num_labels=1),
            distillation="mse",
            representation="logits",
        )
    )
    assert rows[0]["loss_mse"] > 0


@pytest.mark.parametrize("cached", [False, True])
def test_a_causal_language_model(make, arguments, tmp_path, cached):
    """Two rows of different length; the loss is that of the tokens that count."""
    torch.manual_seed(0)
    sizes = {"vocab_size": 30, "n_embd": 16, "n_layer": 1, "n_head": 2, "n_positions": 16}
    models = [GPT2LMHeadModel(GPT2Config(**sizes, bos_token_id=1, eos_token_id=2)) for _ in range(2)]
    ids = [torch.randint(3, 30, (length,)).tolist() for length in (5, 9, 7, 6)]
    columns = {"input_ids": ids, "attention_mask": [[1] * len(row) for row in ids]}

    def collate(rows):
        width = max(len(row["input_ids"]) for row in rows)

        def pad(name, value):
            return torch.tensor([row[name] + [value] * (width - len(row[name])) for row in rows])

        batch = {"input_ids": pad("input_ids", 0), "attention_mask": pad("attention_mask", 0)}
        return batch | {"labels": batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)}

    trainer = SDPruneTrainer(
        models[0],
        arguments(max_steps=1, per_device_train_batch_size=4, logging_steps=1),
        config=SDPruneConfig(
            target_sparsity=0.0,
            distillation={"kl": 1.0, "cosine": 1.0},
            temperature=1.0,
            teacher_cache=str(tmp_path / "cache") if cached else None,
        ),
        train_dataset=EncodedExamples(columns, [0] * 4),
        data_collator=collate,
        teacher_model=models[1],
    )
    models[0].config.resid_pdrop = 0.0
    for module in models[0].modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    with torch.no_grad():
        total = 0.0
        for row in ids:
            inputs = torch.tensor([row])
            student, teacher = (model.eval()(inputs).logits[0, :-1].log_softmax(-1) for model in models)
            total += float((teacher.exp() * (teacher - student)).sum())
    models[0].train()
    (row,) = losses(trainer)
    assert row["loss_kl"] == pytest.approx(total / sum(len(each) - 1 for each in ids), rel=1e-4)


def test_the_learning_rate_restarts_with_every_pruning_step_also_after_resuming(make, model_factory, tmp_path):
    args = {"save_strategy": "steps", "save_steps": 3, "logging_steps": 1, "learning_rate": 1e-3}
    rates = {}
    for name, stops in (("whole", [8]), ("parts", [3, 8])):
        resume = None
        for stop in stops:
            keep = Keep()
            trainer = make(
                model_factory(**QUIET),
                callbacks=[Stop(stop), keep],
                args=args | {"output_dir": str(tmp_path / name)},
                lr_restarts=True,
                end_ratio=0.5,
                distillation=None,
            )
            trainer.train(resume_from_checkpoint=resume)
            resume = str(tmp_path / name / "checkpoint-3")
        rates[name] = [row["learning_rate"] for row in keep.rows if "loss" in row]
    # pruned before the first and the fifth of 8 steps: two cycles of four
    cycle = [1e-3 * (1.0 - 0.9 * step / 4) for step in range(4)]
    assert rates["whole"] == pytest.approx(2 * cycle)
    assert rates["parts"] == rates["whole"][3:]
