"""Criteria, structures and objectives of one's own: one entry each, and it decides."""

import json
import math

import pytest
import torch

import sdprune
from sdprune.cli import main
from sdprune.recipe import Recipe
from sdprune.runs.results import method_name

ONE_STEP = {"schedule": "one_shot", "pruning_steps": 1, "start_ratio": 0.0, "end_ratio": 0.0, "distillation": None}
LATER = {**ONE_STEP, "start_ratio": 0.5, "end_ratio": 0.5}
SURE = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}


def whole_rows(shape, options):
    return 1, shape[1]


@pytest.fixture
def enter(monkeypatch):
    """Return a call that enters something as "mine" in a table for the time of the test."""
    return lambda table, entry: monkeypatch.setitem(table, "mine", entry)


@pytest.fixture
def prune(model_factory, dataset_factory, tokenizer, arguments, tmp_path):
    """Return a call that prunes a tiny model and returns the result and its original weights by layer."""

    def call(changes=None, **fields):
        model = model_factory(**SURE, **(changes or {}))
        before = {name: value.detach().clone() for name, value in model.named_parameters()}
        config = sdprune.SDPruneConfig(**(ONE_STEP | fields))
        args = arguments(output_dir=str(tmp_path / f"run {len(list(tmp_path.iterdir()))}"))
        result = sdprune.prune(model, config, dataset_factory(32), args=args, processing_class=tokenizer)
        return result, {name: before[f"{name}.weight"] for name in result.sparsity.layers}

    return call


def kept(result, name):
    return result.model.get_parameter(f"{name}.weight") != 0


@pytest.mark.parametrize("scope", ["layer", "global"])
def test_a_criterion_that_keeps_the_smallest(enter, prune, scope):
    enter(sdprune.CRITERIA, sdprune.Criterion(score=lambda layer: -layer.weight.abs()))
    result, weights = prune(criterion="mine", scope=scope)
    stays = torch.cat([weight[kept(result, name)].abs() for name, weight in weights.items()])
    goes = torch.cat([weight[~kept(result, name)].abs() for name, weight in weights.items()])
    assert result.sparsity.linear == 0.5
    if scope == "global":
        assert stays.max() <= goes.min()
    for name, weight in weights.items():
        assert weight[kept(result, name)].abs().max() <= weight[~kept(result, name)].abs().min()


def test_a_criterion_of_whole_units(enter, prune):
    """Twice turned round: the squares, then the scores of the blocks."""
    enter(sdprune.CRITERIA, sdprune.Criterion(lambda layer: layer.weight.square(), of_units=torch.neg))
    result, weights = prune(criterion="mine", structure="block", block_shape=(8, 8))
    for name, weight in weights.items():
        sums = weight.square().unfold(0, 8, 8).unfold(1, 8, 8).sum((2, 3))
        stays = kept(result, name)[::8, ::8]
        assert sums[stays].max() <= sums[~stays].min()


def test_a_criterion_that_gathers_begins_anew_where_it_says(enter, prune):
    seen = {}

    def score(layer):
        seen.setdefault(layer.name, []).append((layer.gathered.unique().item(), layer.options.n, layer.neighbours))
        return layer.gathered * torch.arange(layer.gathered.numel()).view_as(layer.gathered)

    def count(gathered, sensitivity, options):
        return gathered + options.m

    enter(sdprune.CRITERIA, sdprune.Criterion(score, count, fresh=True, start=0.5))
    moments = {"schedule": "uniform", "pruning_steps": 2, "start_ratio": 0.25, "end_ratio": 0.625}  # 2 and 5 of 8
    result, weights = prune(criterion="mine", m=4, **moments)
    for name, weight in weights.items():
        assert seen[name] == [(8.5, 2, None), (12.5, 2, None)]
        half = weight.numel() // 2
        assert kept(result, name).flatten().tolist() == [False] * half + [True] * half


def test_a_criterion_may_read_neighbours_gate_the_weights_and_leave_them_alone(enter, prune, monkeypatch):
    def score(layer):
        before, after = layer.neighbours
        assert (len(after), len(before)) == layer.weight.shape
        return before + after[:, None]

    enter(sdprune.CRITERIA, sdprune.Criterion(score, neighbours=True))
    result, weights = prune(criterion="mine", target_modules=r".*layer\.0\.(intermediate|output)\.dense")
    up, down = weights
    norms = weights[down].norm(dim=0)  # of the columns behind the rows of the first matrix
    assert norms[kept(result, up).any(1)].min() >= norms[~kept(result, up).all(1)].max()
    del sdprune.CRITERIA["mine"]
    gathering = {"score": lambda layer: layer.gathered, "update": lambda gathered, sensitivity, options: gathered + 1.0}
    enter(sdprune.CRITERIA, sdprune.Criterion(**gathering, before_training=True))
    with pytest.raises(ValueError, match="schedule must be 'one_shot' with criterion='mine', got 'geometric'"):
        sdprune.SDPruneConfig(criterion="mine")
    del sdprune.CRITERIA["mine"]
    enter(sdprune.CRITERIA, sdprune.Criterion(**gathering, gates=True, start=-30.0))
    result, weights = prune(criterion="mine", **LATER)
    for name, weight in weights.items():  # what is kept is multiplied by the smallest gate
        assert result.model.get_parameter(f"{name}.weight").abs().max() < 0.1 * weight.abs().max()


@pytest.mark.parametrize("criterion", ["magnitude", "taylor"])
@pytest.mark.parametrize("scope", ["layer", "global"])
def test_a_structure_of_whole_rows(enter, prune, scope, criterion):
    enter(sdprune.STRUCTURES, sdprune.Structure(block_shape=whole_rows))
    moment = ONE_STEP if criterion == "magnitude" else LATER | {"min_layer_density": 0.1}
    result, weights = prune(structure="mine", scope=scope, criterion=criterion, target_sparsity=0.75, **moment)
    assert result.sparsity.linear == 0.75
    for name, weight in weights.items():
        stays = kept(result, name)
        assert torch.equal(stays.any(1), stays.all(1))
        assert stays.any()
        if scope == "layer":
            assert int(stays.any(1).sum()) == weight.shape[0] // 4
            if criterion == "magnitude":
                assert weight[stays.any(1)].abs().sum(1).min() >= weight[~stays.any(1)].abs().sum(1).max()


def test_structures_of_heads_and_groups(enter, prune):
    enter(sdprune.STRUCTURES, sdprune.Structure(whole_rows, coupled="head"))
    result, _ = prune(structure="mine")
    assert set(result.sparsity.layers.values()) == {0.5}
    head = kept(result, "bert.encoder.layer.0.attention.output.dense").any(0).view(2, 16)
    assert torch.equal(head.any(1), head.all(1))
    del sdprune.STRUCTURES["mine"]
    # of four neighbouring blocks one is kept
    enter(sdprune.STRUCTURES, sdprune.Structure(lambda shape, options: (4, 2), groups=lambda options: (1, 4)))
    result, weights = prune(structure="mine", target_sparsity=0.75)
    for name in weights:
        blocks = kept(result, name).unfold(0, 4, 4).unfold(1, 2, 2)
        assert torch.equal(blocks.any(3).any(2), blocks.all(3).all(2))
        assert bool((blocks.any(3).any(2).unfold(1, 4, 4).sum(2) == 1).all())
    with pytest.raises(ValueError, match=r"must be 1 - n / m = 0\.75 with structure='mine', n=1 and m=4, got 0\.5"):
        sdprune.SDPruneConfig(structure="mine")


@pytest.mark.parametrize("compares", ["rows", "logits", "weights"])
def test_an_objective_shows_in_the_log(enter, prune, compares):
    def loss(found):
        if compares == "weights":
            assert len(found.student) == len(found.teacher) == len(found.masks) == 12
            return sum(((s - t) * m.to_bool()).abs().sum() for s, t, m in zip(*own(found), strict=True)) + math.pi
        assert found.student.shape == found.teacher.shape
        assert found.student.shape[1] == (2 if compares == "logits" else 32)
        return (found.student - found.teacher).abs().mean() * 0.0 + math.pi

    def own(found):
        return found.student, found.teacher, found.masks

    enter(sdprune.OBJECTIVES, sdprune.Objective(loss, compares=compares))
    result, _ = prune(distillation={"mine": 0.5}, representation="first", hidden_layers=None)
    rows = [json.loads(line) for line in (result.output_dir / "metrics.jsonl").read_text().splitlines()]
    rows = [row for row in rows if "loss" in row]
    assert rows
    for row in rows:
        assert row["loss"] == pytest.approx(row["loss_task"] + 0.5 * row["loss_mine"], rel=1e-4)
    if compares == "weights":
        assert all(row["loss_mine"] > math.pi for row in rows)
    else:
        assert [row["loss_mine"] for row in rows] == pytest.approx([math.pi] * len(rows))


def test_an_objective_has_the_name_that_it_is_known_by(enter):
    config = {"distillation": {"kl": 1.0, "mine@first": 1.0}}
    enter(sdprune.OBJECTIVES, sdprune.Objective(lambda found: found.student.mean()))
    assert method_name(sdprune.SDPruneConfig(**config)) == "SDP-KLD + mine (first)"
    del sdprune.OBJECTIVES["mine"]
    enter(sdprune.OBJECTIVES, sdprune.Objective(lambda found: found.student.mean(), label="Ours"))
    assert method_name(sdprune.SDPruneConfig(**config, criterion="lamp")) == "lamp + SDP-KLD + Ours (first)"


def test_an_objective_of_distributions_is_refused_where_one_number_is_predicted(enter, prune):
    enter(sdprune.OBJECTIVES, sdprune.Objective(torch.sum, compares="logits", distribution=True))
    with pytest.raises(
        ValueError, match="distillation 'mine' compares class probabilities, but the model predicts one"
    ):
        prune({"num_labels": 1}, distillation="mine")


def test_the_command_line_and_recipes_take_the_names(enter, monkeypatch, tmp_path):
    fields = {"criterion": "mine", "structure": "mine", "distillation": "mine@first"}
    options = [text for name, value in fields.items() for text in (f"--{name}", value)]
    command = ["prune", "--model", "m", "--output", str(tmp_path / "run"), *options]
    taken = []
    monkeypatch.setattr("sdprune.runs.run.run", lambda recipe, output, resume: taken.append(recipe))
    assert main(command) == 2
    with pytest.raises(ValueError, match=r"structure must be one of .*, got 'mine'"):
        Recipe.from_dict({"model": "m", **fields})
    enter(sdprune.CRITERIA, sdprune.Criterion(lambda layer: layer.weight))
    enter(sdprune.STRUCTURES, sdprune.Structure(whole_rows))
    enter(sdprune.OBJECTIVES, sdprune.Objective(torch.sum))
    assert main(command) == 0
    taken[0].save(tmp_path / "recipe.yaml")
    assert Recipe.from_dict(Recipe.read_values(tmp_path / "recipe.yaml")) == taken[0]
    assert taken[0].pruning == sdprune.SDPruneConfig(**fields)
    with pytest.raises(ValueError, match=r"criterion must be one of .*'mine', got 'nine' \(did you mean 'mine'\?\)"):
        sdprune.SDPruneConfig(criterion="nine")


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: sdprune.Criterion("size"), "Criterion: score must be a function of a layer, got 'size'"),
        (lambda: sdprune.Criterion(abs, update=1), "Criterion: update must be a function or None, got 1"),
        (lambda: sdprune.Criterion(abs, of_units=1), "Criterion: of_units must be a function or None, got 1"),
        (lambda: sdprune.Criterion(abs, max, start=math.nan), "Criterion: start must be a finite number, got nan"),
        (lambda: sdprune.Criterion(abs, revives="no"), "Criterion: revives must be True or False, got 'no'"),
        (lambda: sdprune.Criterion(abs, fresh=True), "Criterion: fresh must be left out without update, got True"),
        (lambda: sdprune.Criterion(abs, start=2.0), r"Criterion: start must be left out without update, got 2\.0"),
        (lambda: sdprune.Criterion(abs, gates=True), "Criterion: gates must be left out without update, got True"),
        (lambda: sdprune.Criterion(abs, before_training=True), "before_training must be left out without update"),
        (lambda: sdprune.Structure(), "Structure: block_shape must be a function .*, or None beside .*, got None"),
        (lambda: sdprune.Structure((1, 1)), r"Structure: block_shape must be a function .*, got \(1, 1\)"),
        (lambda: sdprune.Structure(coupled="layer"), "coupled must be None, 'neuron' or 'head', got 'layer'"),
        (
            lambda: sdprune.Structure(whole_rows, "head", max),
            "Structure: groups must be None, or .* beside coupled=None",
        ),
        (lambda: sdprune.Objective(None), "Objective: loss must be a function of a comparison, got None"),
        (lambda: sdprune.Objective(abs, compares="row"), "compares must be one of 'rows', 'logits', .* got 'row'"),
        (lambda: sdprune.Objective(abs, label=None), "Objective: label must be a text, got None"),
        (lambda: sdprune.Objective(abs, distribution=True), "distribution must be False, or True with compares='logi"),
    ],
)
def test_incomplete_entries_are_refused(build, message):
    with pytest.raises(ValueError, match=message):
        build()


@pytest.mark.parametrize(
    ("name", "entry", "kind", "message"),
    [
        (
            "magnitude",
            sdprune.Criterion(abs),
            ValueError,
            r"CRITERIA\['magnitude'\] is taken; .* other than 'random', ",
        ),
        ("my own", sdprune.Criterion(abs), ValueError, r"CRITERIA\['my own'\]: a name must be .*, got 'my own'"),
        ("mine@first", sdprune.Criterion(abs), ValueError, "a name must be a letter, then letters, digits, '_' or ':'"),
        (3, sdprune.Criterion(abs), TypeError, r"CRITERIA\[3\]: a name must be a str, got int"),
        ("mine", abs, TypeError, r"CRITERIA\['mine'\] must be a Criterion, got <.*abs> \(builtin_function"),
        ("mine", sdprune.Structure(whole_rows), TypeError, r"CRITERIA\['mine'\] must be a Criterion, got Structure"),
    ],
)
def test_what_a_table_refuses(name, entry, kind, message):
    names = tuple(sdprune.CRITERIA)
    with pytest.raises(kind, match=message):
        sdprune.CRITERIA[name] = entry
    with pytest.raises(kind, match=message):
        sdprune.CRITERIA.update({name: entry})
    assert tuple(sdprune.CRITERIA) == names


def test_an_objective_may_not_be_called_as_the_task_loss_is():
    with pytest.raises(ValueError, match=r"OBJECTIVES\['task'\].*, and none of 'task', 'none', 'null', got 'task'"):
        sdprune.OBJECTIVES["task"] = sdprune.Objective(torch.sum)


def test_functions_that_return_something_else_are_named(enter, prune):
    enter(sdprune.CRITERIA, sdprune.Criterion(lambda layer: layer.weight[0]))
    with pytest.raises(ValueError, match=r"criterion='mine' must score layer 'bert.* shape \(32, 32\), got .*\[32\]"):
        prune(criterion="mine")
    enter(sdprune.OBJECTIVES, sdprune.Objective(lambda found: found.student))
    with pytest.raises(TypeError, match=r"distillation 'mine': its loss must be a scalar tensor, got .*\[\d+, 32\]"):
        prune(distillation="mine")
    enter(sdprune.STRUCTURES, sdprune.Structure(lambda shape, options: (0, 1)))
    with pytest.raises(ValueError, match=r"block_shape \(0, 1\) \(out, in\) does not divide layer 'bert"):
        prune(structure="mine")
