"""`SDPruneCallback`: when it prunes, what stays zero, what it refuses."""

import json
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import Trainer, TrainerCallback

from sdprune import SDPruneCallback, SDPruneConfig
from sdprune.masking.pruner import masked_fraction, measure_sparsity
from sdprune.masking.schedule import sparsity_before
from sdprune.masking.swap import masked_layers, unswap
from sdprune.runs.export_folder import export_folder
from sdprune.training.callback import STATE_NAME

CONFIG = SDPruneConfig(target_sparsity=0.8, pruning_steps=3, end_ratio=0.5, distillation=None)


def make_trainer(model, args, dataset, tokenizer, *callbacks, config=CONFIG):
    return Trainer(
        model, args, train_dataset=dataset, processing_class=tokenizer, callbacks=[SDPruneCallback(config), *callbacks]
    )


@pytest.mark.parametrize("optimizer", [{"optim": "adamw_torch", "weight_decay": 0.1}, {"optim": "sgd"}])
def test_zeros_stay_zeros_after_every_step(model_factory, dataset_factory, tokenizer, arguments, optimizer):
    seen = []

    class Watch(TrainerCallback):
        def on_pre_optimizer_step(self, args, state, control, **kwargs):
            for layer in masked_layers(kwargs["model"]).values():  # masked before anything clipped them
                assert bool((layer.weight.grad[~layer.bit_mask.to_bool()] == 0).all())

        def on_step_end(self, args, state, control, **kwargs):
            model = kwargs["model"]
            for layer in masked_layers(model).values():
                assert bool((layer.weight[~layer.bit_mask.to_bool()] == 0).all())
            expected = sparsity_before(CONFIG, state.max_steps, state.global_step)
            assert measure_sparsity(model).linear == pytest.approx(expected, abs=1e-3)
            seen.append(round(expected, 4))

    trainer = make_trainer(model_factory(), arguments(**optimizer), dataset_factory(64), tokenizer, Watch())
    trainer.train()
    assert seen == pytest.approx([0.4152, 0.4152, 0.658, 0.658, 0.8, 0.8, 0.8, 0.8], abs=1e-4)


def test_the_gradient_norm_that_is_clipped_leaves_pruned_weights_out(
    model_factory, dataset_factory, tokenizer, arguments
):
    norms = []

    class Watch(TrainerCallback):
        def on_log(self, args, state, control, logs=None, **kwargs):
            if "grad_norm" in logs:
                norms.append(logs["grad_norm"])

        def on_pre_optimizer_step(self, args, state, control, **kwargs):
            gradients = [parameter.grad for parameter in kwargs["model"].parameters() if parameter.grad is not None]
            self.own = float(torch.linalg.vector_norm(torch.stack([g.norm() for g in gradients])))

    watch = Watch()
    args = arguments(max_grad_norm=1e9, logging_steps=1)
    make_trainer(model_factory(), args, dataset_factory(64), tokenizer, watch).train()
    assert norms[-1] == pytest.approx(watch.own, rel=1e-4)


@pytest.mark.parametrize("changes", [{"load_best_model_at_end": True}, {"save_strategy": "best"}], ids=str)
def test_selection_before_the_target_is_refused(model_factory, dataset_factory, tokenizer, arguments, changes):
    args = arguments(
        **({"save_strategy": "steps", "eval_strategy": "steps", "metric_for_best_model": "loss"} | changes)
    )
    model = model_factory()
    with pytest.raises(ValueError, match="would keep a model from before the target sparsity; set load_best_model"):
        Trainer(
            model,
            args,
            train_dataset=dataset_factory(8),
            eval_dataset=dataset_factory(8),
            processing_class=tokenizer,
            callbacks=[SDPruneCallback(CONFIG)],
        )
    assert not masked_layers(model)


def test_a_callback_that_came_too_late_says_so(model_factory, dataset_factory, tokenizer, arguments):
    trainer = Trainer(model_factory(), arguments(), train_dataset=dataset_factory(64), processing_class=tokenizer)
    trainer.add_callback(SDPruneCallback(CONFIG))
    with pytest.raises(ValueError, match=r"no masked layers; pass SDPruneCallback in callbacks=\[\.\.\.\]"):
        trainer.train()


@pytest.mark.parametrize("second", [CONFIG, replace(CONFIG, target_sparsity=0.3)], ids=["same", "other"])
def test_two_callbacks_are_refused_when_the_trainer_is_built(model, dataset_factory, tokenizer, arguments, second):
    with pytest.raises(ValueError, match="callbacks holds two SDPruneCallbacks, and each would prune; leave one out"):
        make_trainer(model, arguments(), dataset_factory(8), tokenizer, SDPruneCallback(second))


def test_checkpoints_of_another_configuration_or_other_masks_are_refused(
    model_factory, dataset_factory, tokenizer, arguments, tmp_path
):
    dataset = dataset_factory(64)
    args = arguments(save_strategy="steps", save_steps=4)
    make_trainer(model_factory(), args, dataset, tokenizer).train()
    checkpoint = tmp_path / "run" / "checkpoint-4"
    assert SDPruneConfig.from_pretrained(checkpoint) == CONFIG
    resumed = make_trainer(model_factory(), args, dataset, tokenizer, config=replace(CONFIG, criterion="taylor"))
    with pytest.raises(ValueError, match=r"another configuration \(criterion: 'magnitude' -> 'taylor'\)"):
        resumed.train(resume_from_checkpoint=str(checkpoint))
    state = json.loads((checkpoint / "trainer_state.json").read_text())
    del state["stateful_callbacks"][STATE_NAME]  # as older versions wrote it
    (checkpoint / "trainer_state.json").write_text(json.dumps(state))
    resumed = make_trainer(model_factory(), args, dataset, tokenizer, config=replace(CONFIG, target_sparsity=0.3))
    with pytest.raises(ValueError, match=r"the masks have sparsity 0\.658\d where this configuration has 0\.2116"):
        resumed.train(resume_from_checkpoint=str(checkpoint))


def test_a_checkpoint_whose_names_do_not_fit_is_refused_before_the_first_pruning_step(
    model_factory, dataset_factory, tokenizer, arguments, tmp_path
):
    config = gradient_config(criterion="magnitude", start_ratio=0.5)  # no sparsity yet that would tell
    args = arguments(save_strategy="steps", save_steps=2)
    make_trainer(model_factory(), args, dataset_factory(64), tokenizer, config=config).train()
    weights = tmp_path / "run" / "checkpoint-2" / "model.safetensors"
    renamed = {name.replace("bert.encoder.layer.", "bert.layers."): value for name, value in load_file(weights).items()}
    save_file(renamed, weights, metadata={"format": "pt"})
    resumed = make_trainer(model_factory(), args, dataset_factory(64), tokenizer, config=config)
    message = r"has no mask of layer 'bert\.encoder\.layer\.0\.attention\.self\.query' \(12 such layers\)"
    with pytest.raises(ValueError, match=message):
        resumed.train(resume_from_checkpoint=str(weights.parent))


@pytest.mark.parametrize("restores", [False, True])
def test_a_plain_trainer_resumes_exactly_beside_callbacks_of_its_own(
    model_factory, dataset_factory, tokenizer, arguments, tmp_path, restores
):
    config = gradient_config(criterion="l0")
    args = arguments(save_strategy="steps", save_steps=3, restore_callback_states_from_checkpoint=restores)
    states = []
    for resume in (None, str(tmp_path / "run" / "checkpoint-3")):
        trainer = make_trainer(model_factory(seed=len(states)), args, dataset_factory(64), tokenizer, config=config)
        trainer.train(resume_from_checkpoint=resume)
        states.append(trainer.model.state_dict())
    assert all(torch.equal(value, states[1][name]) for name, value in states[0].items())
    exported = export_folder(tmp_path / "run" / "checkpoint-6", tmp_path / "exported")
    found = type(trainer.model).from_pretrained(exported)
    assert measure_sparsity(found, list(masked_layers(trainer.model))).linear == pytest.approx(0.4571, abs=1e-3)


def gradient_config(**changes):
    values = {"target_sparsity": 0.6, "pruning_steps": 3, "start_ratio": 0.25, "end_ratio": 0.75, "distillation": None}
    return SDPruneConfig(**(values | changes))


CRITERIA_RUNS = [
    {"criterion": "taylor"},
    {"criterion": "movement", "structure": "block", "block_shape": (16, 8), "target_sparsity": 0.5},
    {"criterion": "soft_movement", "structure": "hybrid", "block_shape": (16, 8), "target_sparsity": 0.5},
    {"criterion": "l0", "scope": "global", "min_layer_density": 0.1},
    {"criterion": "gradient", "structure": "head", "target_sparsity": 0.5, "pruning_steps": 1},
]


@pytest.mark.parametrize("changes", CRITERIA_RUNS, ids=str)
def test_criteria_that_need_gradients_reach_the_target_and_resume_exactly(
    model_factory, dataset_factory, tokenizer, arguments, tmp_path, changes
):
    config, dataset = gradient_config(**changes), dataset_factory(64)
    args = arguments(save_strategy="steps", save_steps=3, gradient_accumulation_steps=2)
    whole = make_trainer(model_factory(), args, dataset, tokenizer, config=config)
    whole.train()
    for checkpoint in ("checkpoint-3", "checkpoint-6"):
        resumed = make_trainer(model_factory(seed=9), args, dataset, tokenizer, config=config)
        resumed.train(resume_from_checkpoint=str(tmp_path / "run" / checkpoint))
        state = resumed.model.state_dict()
        assert all(torch.equal(value, state[name]) for name, value in whole.model.state_dict().items())
    layers = masked_layers(unswap(whole.model)) or masked_layers(resumed.model)
    assert masked_fraction(resumed.model) == pytest.approx(config.target_sparsity, abs=1e-3)
    assert not any(layer.gathering for layer in layers.values())
    assert measure_sparsity(whole.model, list(layers)).linear == pytest.approx(config.target_sparsity, abs=1e-3)


def test_scores_do_not_depend_on_the_clipping(model_factory, dataset_factory, tokenizer, arguments):
    scores = []
    config = gradient_config(criterion="gradient", pruning_steps=1)
    for limit in (1e-6, 1e6):

        class Watch(TrainerCallback):
            def on_optimizer_step(self, args, state, control, **kwargs):
                if state.global_step == 0:
                    layer = next(iter(masked_layers(kwargs["model"]).values()))
                    scores.append(layer.score.clone())

        args = arguments(max_grad_norm=limit, max_steps=4, learning_rate=0.0)
        make_trainer(model_factory(), args, dataset_factory(64), tokenizer, Watch(), config=config).train()
    assert float(scores[0].abs().max()) > 0
    torch.testing.assert_close(scores[0], scores[1])


def test_epsd_ranks_the_untouched_network(model_factory, dataset_factory, tokenizer, arguments):
    config = gradient_config(criterion="epsd", schedule="one_shot", pruning_steps=1)
    model = model_factory()
    before = {name: value.detach().clone() for name, value in model.named_parameters()}
    seen = []

    class Watch(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            seen.append(all(torch.equal(value, before[name]) for name, value in kwargs["model"].named_parameters()))

    args = arguments(optim="adamw_torch", weight_decay=0.1)
    make_trainer(model, args, dataset_factory(64), tokenizer, Watch(), config=config).train()
    assert seen == [True, True] + [False] * 6
    assert masked_fraction(model) == pytest.approx(0.6, abs=1e-3)


def test_a_pruning_step_before_any_gradient_is_refused(model_factory, dataset_factory, tokenizer, arguments):
    config = gradient_config(criterion="movement", start_ratio=0.0)
    trainer = make_trainer(model_factory(), arguments(), dataset_factory(64), tokenizer, config=config)
    with pytest.raises(ValueError, match=r"ranks by gradients, .* set start_ratio to at least 0\.125, got 0\.0"):
        trainer.train()


@pytest.mark.parametrize("structure", ["neuron", "n:m", "hybrid"])
def test_the_target_is_reached_where_training_ends_early(
    model_factory, dataset_factory, tokenizer, arguments, structure
):
    class Stop(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            control.should_training_stop = state.global_step == 3

    changes = {"structure": structure, "block_shape": (8, 8), "target_sparsity": 0.75, "n": 1, "m": 4}
    model = model_factory()
    config = gradient_config(criterion="movement", **changes)
    make_trainer(model, arguments(), dataset_factory(64), tokenizer, Stop(), config=config).train()
    assert masked_fraction(model) == pytest.approx(0.75, abs=1e-3)
    names = list(masked_layers(model))
    assert measure_sparsity(unswap(model), names).linear == pytest.approx(0.75, abs=1e-3)
