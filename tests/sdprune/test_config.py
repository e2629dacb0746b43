"""Configurations check themselves and survive JSON and YAML."""

import json

import pytest

from sdprune import SDPruneConfig
from sdprune.config import CONFIG_NAME
from sdprune.recipe import DataConfig, Recipe, TrainingConfig


def test_json_round_trip(tmp_path):
    config = SDPruneConfig(
        target_sparsity=0.7,
        structure="block",
        block_shape=(16, 64),
        target_modules=("a", "b"),
        distillation={"kl": 0.5, "cosine": 1.0, "cross_correlation@first": 0.1, "mse@mean@-1": 2.0},
    )
    config.save_pretrained(tmp_path)
    assert SDPruneConfig.from_pretrained(tmp_path) == config
    assert json.loads((tmp_path / CONFIG_NAME).read_text())["block_shape"] == [16, 64]


def test_yaml_round_trip(tmp_path):
    recipe = Recipe("folder", DataConfig(data="x.csv"), TrainingConfig(bf16=True), SDPruneConfig(distillation=None))
    recipe.save(tmp_path / "recipe.yaml")
    assert Recipe.from_dict(Recipe.read_values(tmp_path / "recipe.yaml")) == recipe


def test_yaml_numbers_mean_what_they_look_like(tmp_path):
    (tmp_path / "r.yaml").write_text(
        "model: m\nlearning_rate: 1e-4\ndistillation: {kl: 1e-3, mse@logits: 2}\n"
        "target_sparsity: 0\nblock_shape: [8, 8]\n"
    )
    recipe = Recipe.from_dict(Recipe.read_values(tmp_path / "r.yaml"))
    assert recipe.training.learning_rate == 1e-4
    assert recipe.pruning.distillation == {"kl": 1e-3, "mse@logits": 2.0}
    assert recipe.pruning.target_sparsity == 0.0
    assert recipe.pruning.block_shape == (8, 8)


def test_field_names_of_the_parts_do_not_overlap():
    names = [name for kind in (DataConfig, TrainingConfig, SDPruneConfig) for name in kind.field_names()]
    assert len(names) == len(set(names))
    assert "model" not in names


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"target_sparsity": 1.0}, r"target_sparsity must lie in \[0, 1\), got 1.0"),
        ({"target_sparsity": -0.1}, r"target_sparsity must lie in \[0, 1\), got -0.1"),
        ({"target_sparsity": float("nan")}, r"target_sparsity must lie in \[0, 1\), got nan"),
        ({"structure": "blok"}, r"structure must be one of .*'hybrid', got 'blok' \(did you mean 'block'"),
        ({"block_shape": (0, 8)}, r"block_shape must hold two positive sizes \(out, in\), got \(0, 8\)"),
        ({"criterion": "taylor", "block_reduction": "max"}, "block_reduction must be 'sum' with criterion='taylor'"),
        ({"criterion": "move"}, "criterion must be one of .*, got 'move'"),
        ({"schedule": "linear"}, "schedule must be one of 'one_shot', 'uniform', 'geometric', 'cubic', got 'linear'"),
        ({"start_ratio": 0.7, "end_ratio": 0.5}, "start_ratio and end_ratio must satisfy"),
        ({"pruning_steps": 0}, "pruning_steps must be a finite number >= 1, got 0"),
        ({"distillation": "kld"}, "distillation: unknown key 'kld'; did you mean 'kl'"),
        ({"distillation": {"kl": -1.0}}, r"distillation\['kl'\] must be a finite number >= 0, got -1.0"),
        ({"distillation": "mze@logits"}, "distillation 'mze@logits': unknown key 'mze'; did you mean 'mse'"),
        ({"distillation": {"mse@": 1}}, "distillation 'mse@': the representation must be one of 'first', .*, got ''"),
        ({"distillation": "mse@nowhere"}, "'mse@nowhere': the representation must be one of .*, got 'nowhere'"),
        ({"distillation": "mse@mean@x"}, "'mse@mean@x': a hidden state is a whole number, as in 'mean@2', .*'mean@x'"),
        ({"distillation": "mse@mean@"}, "distillation 'mse@mean@': a hidden state is a whole number"),
        ({"distillation": "mse@logits@2"}, "a hidden state is .* of 'first', 'mean', 'tokens', got 'logits@2'"),
        ({"distillation": "kl@first"}, "'kl@first': kl compares logits only and .*, got 'first'; write 'kl'"),
        ({"distillation": {"aligned_cosine@mean": 1.0}}, "aligned_cosine compares weights only .*, got 'mean'"),
        ({"distillation": {"mse@logits": -1.0}}, r"distillation\['mse@logits'\] must be a finite number >= 0"),
        ({"distillation": "mse@first", "representation": "logits", "hidden_layers": ()}, "hidden_layers must name at"),
        (
            {"distillation": "mse@pooled", "representation": "logits", "hidden_layers": (1,)},
            "hidden_layers .* goes with",
        ),
        ({"distillation_weight": float("inf")}, "distillation_weight must be a finite number >= 0.0, got inf"),
        ({"temperature": 0.0}, "temperature must be a finite number > 0, got 0.0"),
        ({"representation": "last"}, "representation must be one of"),
        ({"seed": -1}, "seed must be a finite number >= 0, got -1"),
    ],
)
def test_wrong_values_are_named(fields, message):
    with pytest.raises(ValueError, match=message):
        SDPruneConfig(**fields)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"target_sparsity": "much"}, r"target_sparsity must be float, got 'much' \(str\)"),
        ({"seed": True}, r"seed must be int, got True \(bool\)"),
        ({"pruning_steps": 2.5}, r"pruning_steps must be int, got 2.5 \(float\)"),
        ({"block_shape": (8,)}, r"block_shape must be tuple.*got \(8,\)"),
        ({"target_modules": ("a", 1)}, "target_modules must be"),
    ],
)
def test_wrong_types_are_named(fields, message):
    with pytest.raises(TypeError, match=message):
        SDPruneConfig(**fields)


def test_a_misspelt_key_gets_the_nearest_name():
    with pytest.raises(ValueError, match="unknown key 'target_sparsty'; did you mean 'target_sparsity'"):
        Recipe.from_dict({"model": "m", "target_sparsty": 0.5})
    with pytest.raises(ValueError, match="unknown key 'learning-rate'; did you mean 'learning_rate'"):
        Recipe.from_dict({"model": "m", "learning-rate": 0.5})


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("- a\n- b\n", "must hold `key: value` lines"),
        ("1: 2\n", "must hold `key: value` lines"),
        ("a: [", "not valid YAML"),
    ],
)
def test_a_file_that_is_no_recipe(tmp_path, text, message):
    (tmp_path / "r.yaml").write_text(text)
    with pytest.raises(ValueError, match=message):
        Recipe.read_values(tmp_path / "r.yaml")


@pytest.mark.parametrize(
    "fields", [{"learning_rate": 0.0}, {"max_steps": 0}, {"save_steps": 0}, {"lr_scheduler_type": "lin"}], ids=str
)
def test_training_is_checked(fields):
    with pytest.raises(ValueError, match=f"{next(iter(fields))} must be"):
        TrainingConfig(**fields)
