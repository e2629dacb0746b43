"""Who calls `train`, and how often: again, with smaller batches, with models made anew, over streams of rows."""

import copy
import itertools
import json

import datasets
import pytest
import torch
from torch.utils.data import IterableDataset
from transformers import Trainer, TrainerCallback
from transformers.trainer_callback import TrainerState

from sdprune import SDPruneCallback, SDPruneConfig, SDPruneTrainer, prune
from sdprune.masking.pruner import masked_fraction, measure_sparsity
from sdprune.masking.swap import masked_layers, unswap
from sdprune.training.checks import has_rows

CONFIG = SDPruneConfig(target_sparsity=0.7, pruning_steps=3, distillation=None)
TAUGHT = SDPruneConfig(target_sparsity=0.7, pruning_steps=3, distillation="cross_correlation")


class Stream(IterableDataset):
    def __init__(self, rows):
        self.rows = rows

    def __iter__(self):
        return (self.rows[place] for place in range(len(self.rows)))


class Sized(Stream):
    def __len__(self):
        return len(self.rows)


def streams_of(rows):
    table = datasets.Dataset.from_list([rows[place] for place in range(len(rows))])
    return {"stream": Stream(rows), "sized": Sized(rows), "datasets": table.to_iterable_dataset()}


@pytest.fixture
def make_trainer(dataset_factory, tokenizer, arguments):
    """Return a maker of trainers that prune, with or without a teacher."""

    def make(model=None, *, config=CONFIG, callback=None, args=None, **options):
        kind = {True: SDPruneTrainer, False: Trainer}[config.distillation is not None]
        own = {"config": config} if kind is SDPruneTrainer else {}
        return kind(
            model,
            args or arguments(),
            train_dataset=dataset_factory(64),
            processing_class=tokenizer,
            callbacks=[callback or SDPruneCallback(config)],
            **own,
            **options,
        )

    return make


def check_pruned(model, sparsity=0.7):
    """The masks have the target, and every zero that they ask for is there once the layers are dense again."""
    assert masked_fraction(model) == pytest.approx(sparsity, abs=1e-3)
    names = list(masked_layers(model))
    assert measure_sparsity(unswap(copy.deepcopy(model)), names).linear == pytest.approx(sparsity, abs=1e-3)


class Watch(TrainerCallback):
    """Notes the sparsity after every step."""

    def __init__(self):
        self.seen = []

    def on_step_end(self, args, state, control, **kwargs):
        self.seen.append(round(masked_fraction(kwargs["model"]), 3))


@pytest.mark.parametrize("kind", ["stream", "sized", "datasets"])
@pytest.mark.parametrize("taught", [True, False])
def test_streams_train(kind, taught, model, dataset_factory, tokenizer, arguments):
    rows = streams_of(dataset_factory(40))[kind]
    assert not has_rows(rows)
    assert has_rows(dataset_factory(8))
    evaluation = streams_of(dataset_factory(16, seed=3))[kind]
    args = arguments(train_sampling_strategy="group_by_length")
    result = prune(model, TAUGHT if taught else CONFIG, rows, evaluation, args=args, processing_class=tokenizer)
    assert result.sparsity.linear == pytest.approx(0.7, abs=1e-3)
    assert result.metrics["eval_loss"] > 0.0


@pytest.mark.parametrize("kind", ["stream", "sized", "datasets"])
def test_what_a_stream_cannot_do_is_refused_before_anything_is_written(
    kind, model_factory, dataset_factory, tokenizer, arguments, tmp_path
):
    rows = streams_of(dataset_factory(40))[kind]
    cached = SDPruneConfig(distillation="kl", teacher_cache=str(tmp_path / "cache"), pruning_steps=2)
    watched = SDPruneConfig(diagnostics_steps=2, pruning_steps=2)
    for config, options, message in (
        (cached, {}, "teacher_cache='.*' needs a train_dataset with a length and rows by number, got the stream"),
        (CONFIG, {"resume_from_checkpoint": "latest"}, "resume_from_checkpoint='latest' needs a train_dataset with a"),
        (watched, {}, r"diagnostics_steps=2 measures on the evaluation data: .* got \w+"),
    ):
        with pytest.raises(ValueError, match=message) as raised:
            prune(model_factory(), config, rows, rows, args=arguments(**options), processing_class=tokenizer)
        assert "\n" not in str(raised.value)
        assert list(tmp_path.iterdir()) == []
    if kind != "sized":
        with pytest.raises(ValueError, match="max_steps"):
            prune(model_factory(), CONFIG, rows, args=arguments(max_steps=-1), processing_class=tokenizer)
        assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("config", [CONFIG, TAUGHT], ids=["plain", "taught"])
def test_a_second_training_keeps_what_the_first_one_pruned(config, model, make_trainer):
    trainer, watch = make_trainer(model, config=config), Watch()
    trainer.add_callback(watch)
    trainer.train()
    kept = {name: layer.mask.clone() for name, layer in masked_layers(trainer.model).items()}
    before = trainer.model.state_dict()["bert.encoder.layer.0.output.dense.weight"].clone()
    trainer.train()
    check_pruned(trainer.model)
    assert watch.seen == sorted(watch.seen)
    assert len(watch.seen) == 16
    assert all(torch.equal(layer.mask, kept[name]) for name, layer in masked_layers(trainer.model).items())
    assert not torch.equal(trainer.model.state_dict()["bert.encoder.layer.0.output.dense.weight"], before)


@pytest.mark.parametrize("criterion", ["taylor", "movement", "soft_movement", "l0"])
def test_a_second_training_with_a_criterion_of_gradients(criterion, model, make_trainer):
    config = SDPruneConfig(
        target_sparsity=0.7, pruning_steps=3, start_ratio=0.25, criterion=criterion, distillation=None
    )
    trainer = make_trainer(model, config=config)
    trainer.train()
    trainer.train()
    check_pruned(trainer.model)


def test_a_second_training_resumes_from_its_own_checkpoints(model_factory, make_trainer, arguments, tmp_path):
    args = arguments(save_strategy="steps", save_steps=4)
    trainer = make_trainer(model_factory(), args=args)
    trainer.train()
    trainer.train()
    again = make_trainer(model_factory(), args=args)
    again.train(resume_from_checkpoint=str(tmp_path / "run" / "checkpoint-4"))
    check_pruned(again.model)
    theirs = again.model.state_dict()
    assert all(torch.equal(value, theirs[name]) for name, value in trainer.model.state_dict().items())


@pytest.mark.parametrize("criterion", ["magnitude", "taylor", "soft_movement", "l0"])
def test_the_same_trainer_goes_back_to_a_checkpoint(criterion, model, make_trainer, arguments, tmp_path):
    """From before the last pruning step: scores are gathered again, gates are random again."""
    start = 0.0 if criterion == "magnitude" else 0.25
    config = SDPruneConfig(
        target_sparsity=0.7, pruning_steps=3, start_ratio=start, end_ratio=0.8, criterion=criterion, distillation=None
    )
    trainer = make_trainer(model, config=config, args=arguments(save_strategy="steps", save_steps=3))
    trainer.train()
    expected = {name: value.clone() for name, value in trainer.model.state_dict().items()}
    trainer.train(resume_from_checkpoint=str(tmp_path / "run" / "checkpoint-3"))
    assert all(torch.equal(value, expected[name]) for name, value in trainer.model.state_dict().items())


def test_a_model_that_is_pruned_further_already_is_refused(model, make_trainer):
    make_trainer(model).train()
    trainer = make_trainer(model, config=SDPruneConfig(target_sparsity=0.5, distillation=None, pruning_steps=2))
    with pytest.raises(ValueError, match=r"is pruned to 0\.7\d* already, further than target_sparsity=0\.5"):
        trainer.train()
    trainer = make_trainer(model, config=SDPruneConfig(target_sparsity=0.9, distillation=None, pruning_steps=2))
    trainer.train()
    check_pruned(trainer.model, 0.9)


class Hungry:
    """A collator for which batches above a size are too many, from some batch on; it counts the rows it gave."""

    def __init__(self, collate, most, after):
        self.collate, self.most, self.after = collate, most, after
        self.sizes = []

    def __call__(self, rows):
        self.sizes.append(len(rows))
        if len(rows) > self.most and len(self.sizes) > self.after:
            raise RuntimeError("CUDA out of memory. Tried to allocate 2.00 GiB")
        return self.collate(rows)


@pytest.mark.parametrize("after", [0, 5])
@pytest.mark.parametrize("config", [CONFIG, TAUGHT], ids=["plain", "taught"])
def test_smaller_batches_after_an_out_of_memory(config, after, model, make_trainer, arguments, tokenizer):
    from transformers import DataCollatorWithPadding

    collate = Hungry(DataCollatorWithPadding(tokenizer), most=6, after=after)
    watch = Watch()
    trainer = make_trainer(model, config=config, args=arguments(auto_find_batch_size=True), data_collator=collate)
    trainer.add_callback(watch)
    trainer.train()
    check_pruned(trainer.model)
    assert max(collate.sizes[-8:]) <= 6
    assert watch.seen == sorted(watch.seen)
    assert trainer.state.global_step == 8


@pytest.mark.parametrize("after", [0, 5])
def test_smaller_batches_in_a_whole_run(after, model, dataset_factory, tokenizer, arguments, tmp_path):
    from transformers import DataCollatorWithPadding

    collate = Hungry(DataCollatorWithPadding(tokenizer), most=6, after=after)
    args = arguments(auto_find_batch_size=True, disable_tqdm=False, train_sampling_strategy="group_by_length")
    result = prune(model, TAUGHT, dataset_factory(64), args=args, processing_class=tokenizer, data_collator=collate)
    assert result.sparsity.linear == pytest.approx(0.7, abs=1e-3)
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines if "loss" in line] == [2, 4, 6, 8]


@pytest.mark.parametrize("config", [CONFIG, TAUGHT], ids=["plain", "taught"])
def test_models_made_anew(config, model_factory, make_trainer):
    """Each training has a model of its own, as in a search over hyperparameters; the teacher is a copy of that one."""
    seeds = itertools.count()
    made = []

    def model_init():
        made.append(model_factory(next(seeds)))
        return made[-1]

    trainer = make_trainer(config=config, model_init=model_init)
    for trial in (1, 2):
        trainer.train()
        assert trainer.model is made[trial]
        check_pruned(trainer.model)
        if config is TAUGHT:
            dense = model_factory(trial).state_dict()
            taught = trainer.teacher.model.state_dict()
            assert all(torch.equal(value, taught[name]) for name, value in dense.items())
    embeddings = made[2].get_input_embeddings().weight
    assert not torch.equal(embeddings, model_factory(2).get_input_embeddings().weight)  # it has trained


def test_models_made_anew_do_not_go_on_from_a_checkpoint(model_factory, make_trainer, arguments, tmp_path):
    args = arguments(save_strategy="steps", save_steps=4)
    make_trainer(model_factory(), args=args).train()
    trainer = make_trainer(model_init=lambda: model_factory(), args=args)
    with pytest.raises(ValueError, match=r"Trainer\(model_init=...\) made the model anew .* give model=... instead"):
        trainer.train(resume_from_checkpoint=str(tmp_path / "run" / "checkpoint-4"))


def test_one_callback_for_two_trainers(model_factory, make_trainer):
    callback = SDPruneCallback(CONFIG)
    first = make_trainer(model_factory(), callback=callback)
    second = make_trainer(model_factory(1, num_hidden_layers=3, intermediate_size=96), callback=callback)
    for trainer in (first, second):
        trainer.train()
        check_pruned(trainer.model)


def test_one_callback_is_enough(model, make_trainer, dataset_factory, arguments, tokenizer):
    for callback in (SDPruneCallback(CONFIG), SDPruneCallback):
        with pytest.raises(ValueError, match="callbacks holds an SDPruneCallback, but `prune` adds its own"):
            prune(model, CONFIG, dataset_factory(16), args=arguments(), callbacks=iter([callback]))
    trainer = make_trainer(model)
    trainer.add_callback(SDPruneCallback(SDPruneConfig(target_sparsity=0.3)))
    other = trainer.callback_handler.callbacks[-1]
    other.on_init_end(trainer.args, TrainerState(), trainer.control, model=trainer.model)
    with pytest.raises(ValueError, match="another SDPruneCallback of the Trainer has another configuration"):
        trainer.train()


def test_a_model_that_does_not_train(model_factory, dataset_factory, arguments, tokenizer, tmp_path, caplog):
    rows = dataset_factory(32)

    def run(model, config=CONFIG):
        return prune(model, config, rows, args=arguments(), processing_class=tokenizer)

    model = model_factory().requires_grad_(False)
    with pytest.raises(ValueError, match=r"no parameter .* requires a gradient; call model\.requires_grad_\(True\)"):
        run(model)
    assert not masked_layers(model)
    assert list(tmp_path.iterdir()) == []
    model.classifier.requires_grad_(True)
    with pytest.raises(
        ValueError, match=r"ranks by gradients, but the weight of layer 'bert.* requires none \(12 such"
    ):
        run(model, SDPruneConfig(criterion="taylor", start_ratio=0.25, pruning_steps=2))
    assert list(tmp_path.iterdir()) == []
    assert run(model).sparsity.linear == pytest.approx(0.7, abs=1e-3)
    assert (
        "is pruned, but its weight is frozen (requires_grad=False), so that it cannot recover; 12 such" in caplog.text
    )
