"""The comparison of all recipes; the runs themselves are those of tests/sdprune/runs/test_recipes.py."""

import json
from pathlib import Path

import pytest

from bench import recipes as module
from bench.__main__ import main
from bench.recipes import NAMES, draw, markdown, recipe_of
from sdprune.masking.schedule import pruning_moments
from sdprune.recipe import Recipe, recipe_names
from sdprune.runs.demo import FULL, QUICK

DENSE = {"recipe": "dense", "sparsity": 0.0, "kept": 1.0, "accuracy": 0.82, "macro_f1": 0.81, "separability": 0.4}
ROWS = [
    DENSE | {"test_rows": 400},
    DENSE | {"recipe": "sdp-cc", "sparsity": 0.7, "accuracy": 0.78, "signal_to_noise": 3.21, "test_rows": 400},
]


@pytest.mark.parametrize("size", [FULL, QUICK], ids=["full", "quick"])
@pytest.mark.parametrize("name", NAMES)
def test_every_recipe_fits_the_length_of_the_demo(name, size):
    recipe = recipe_of(name, "model", size, bf16=False)
    assert recipe.training.max_steps == size.training.max_steps
    dense = name == "dense, same steps"
    assert recipe.pruning.target_sparsity == (0.0 if dense else 0.7)
    moments = pruning_moments(recipe.pruning, recipe.training.max_steps)
    assert len(moments) == len(set(moments))
    assert dense or moments
    if name in recipe_names():
        own = Recipe.from_dict({"model": "model"} | Recipe.read_values(Recipe.find(name)))
        assert recipe.pruning.distillation_weights == own.pruning.distillation_weights
        assert recipe.pruning.criterion == own.pruning.criterion
        assert recipe.stages == own.stages
        assert recipe.training.learning_rate == own.training.learning_rate
    elif name in ("dense, same steps", "no teacher"):
        assert not recipe.pruning.distillation_weights


def test_the_table_leaves_out_what_a_row_lacks():
    lines = markdown(ROWS).splitlines()
    assert lines[0].startswith("| recipe | sparsity |")
    assert lines[2] == "| dense | 0.0% | 100.0% | 82.0% | 81.0% |  | 0.400 |  |  |"
    assert "| 3.2 |" in lines[3]


def test_the_picture_has_a_point_a_recipe():
    (axes,) = draw(ROWS).axes
    assert [label.get_text() for label in axes.get_yticklabels()] == ["sdp-cc"]
    assert [text.get_text() for text in axes.get_legend().get_texts()] == ["dense, 82.0%"]


def test_training_time_is_that_of_all_stages(tmp_path: Path):
    for stage, seconds in (("teacher", 60.0), ("student", 30.0)):
        (tmp_path / stage).mkdir()
        rows = [{"loss": 1.0, "step": 1}, {"train_runtime": seconds, "step": 2}]
        (tmp_path / stage / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert module._training_seconds(tmp_path) == 90.0


def test_an_unknown_name_is_refused(tmp_path: Path):
    with pytest.raises(SystemExit, match="no sdp-xx; choose of: dense, same steps, no teacher"):
        main(["recipes", "--recipe", "sdp-xx", "--output", str(tmp_path / "runs")])
    assert not (tmp_path / "runs").exists()
