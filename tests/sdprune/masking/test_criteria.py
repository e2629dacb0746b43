"""Each criterion against its definition, written out plainly."""

import math

import pytest
import torch
from torch.nn import functional

from sdprune import MaskedLinear, SDPruneConfig
from sdprune.distillation.terms import BatchOutputs, distillation_terms
from sdprune.masking.pruner import gather, mask_model, masked_fraction, prune_step, zero_pruned
from sdprune.masking.swap import masked_layers
from sdprune.methods.criteria import CRITERIA, Layer, expected_gate, lamp, lookahead, magnitude, random, sampled_gate
from tests.ranks import spawn

SURE = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
LAYER = "bert.encoder.layer.1.intermediate.dense"
SENSITIVITY_CRITERIA = ("gradient", "taylor", "movement", "soft_movement", "l0", "epsd")


def config_for(criterion, **changes):
    schedule = {"schedule": "one_shot", "pruning_steps": 1} if criterion == "epsd" else {}
    return SDPruneConfig(**({"criterion": criterion, "start_ratio": 0.1} | schedule | changes))


def score_of(criterion, gathered):
    return CRITERIA[criterion].score(Layer(LAYER, gathered, config_for(criterion), gathered))


def dense_gradients(model, batch, names):
    """Gradient of the loss for the weights, by torch alone."""
    weights = [model.get_parameter(f"{name}.weight") for name in names]
    return dict(zip(names, torch.autograd.grad(model(**batch).loss, weights), strict=True))


def halves(batch):
    return [{name: value[part::2] for name, value in batch.items()} for part in (0, 1)]


def test_magnitude():
    weight = torch.tensor([[-3.0, 0.5], [0.0, 2.0]])
    assert magnitude(weight).tolist() == [[3.0, 0.5], [0.0, 2.0]]
    assert magnitude(weight, 2).tolist() == [[9.0, 0.25], [0.0, 4.0]]


def test_l1_and_l2_rank_blocks_differently():
    """One large weight wins by L2, many middling ones by L1."""
    kept = {}
    for norm in (1, 2):
        config = SDPruneConfig(structure="block", block_shape=(1, 2), magnitude_norm=norm, target_modules="0")
        layer = torch.nn.ModuleList([torch.nn.Linear(4, 1)])
        with torch.no_grad():
            layer[0].weight.copy_(torch.tensor([[3.0, 0.0, 2.0, 2.0]]))
        mask_model(layer, config)
        prune_step(layer, config, 0.5)
        kept[norm] = layer[0].bit_mask.to_bool().tolist()
    assert kept == {1: [[False, False, True, True]], 2: [[True, True, False, False]]}


def test_random_is_seeded_by_name_and_nested(model_factory):
    masks = []
    for seed in (0, 0, 1):
        model = model_factory(seed=len(masks))  # whatever the weights
        config = SDPruneConfig(criterion="random", seed=seed)
        mask_model(model, config)
        prune_step(model, config, 0.3)
        first = masked_layers(model)[LAYER].bit_mask.to_bool()
        prune_step(model, config, 0.6)
        masks.append(masked_layers(model)[LAYER].bit_mask.to_bool())
        assert not bool((masks[-1] & ~first).any())
    assert torch.equal(masks[0], masks[1])
    assert not torch.equal(masks[0], masks[2])
    other = masked_layers(model)["bert.encoder.layer.0.intermediate.dense"].bit_mask.to_bool()
    assert not torch.equal(masks[2], other)
    scores = random(torch.empty(200, 50), torch.Generator().manual_seed(0))
    assert scores.mean().item() == pytest.approx(0.5, abs=0.01)


def test_lamp_by_its_definition():
    weight = torch.randn(5, 7, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    found = lamp(weight.square())
    values = weight.flatten().square().tolist()
    expected = [own / sum(other for other in values if other >= own) for own in values]
    torch.testing.assert_close(found.flatten(), torch.tensor(expected, dtype=torch.float64))
    assert found.max() == 1.0
    assert lamp(torch.zeros(3)).tolist() == [0.0, 0.0, 0.0]


def test_lamp_with_global_scope_lets_no_layer_die(model):
    config = SDPruneConfig(criterion="lamp", scope="global")
    mask_model(model, config)
    with torch.no_grad():
        masked_layers(model)[LAYER].weight.mul_(1e-6)
    prune_step(model, config, 0.9)
    assert masked_fraction(model) == pytest.approx(0.9, abs=1e-4)
    assert masked_layers(model)[LAYER].sparsity == pytest.approx(0.9, abs=0.05)  # its scale does not matter


def test_lookahead_by_its_definition(model):
    before, after = torch.tensor([1.0, 2.0]), torch.tensor([3.0, 0.5])
    weight = torch.tensor([[1.0, -1.0], [2.0, 4.0]])
    assert lookahead(weight, before, after).tolist() == [[3.0, 6.0], [1.0, 4.0]]
    first = model.bert.encoder.layer[1].intermediate.dense.weight.detach().clone()
    second = model.bert.encoder.layer[1].output.dense.weight.detach().clone()
    config = SDPruneConfig(criterion="lookahead")
    mask_model(model, config)
    prune_step(model, config, 0.5)
    scores = first.abs() * second.norm(dim=0)[:, None]
    kept = masked_layers(model)[LAYER].bit_mask.to_bool()
    assert scores[kept].min() >= scores[~kept].max()
    scores = second.abs() * first.norm(dim=1)[None]
    kept = masked_layers(model)["bert.encoder.layer.1.output.dense"].bit_mask.to_bool()
    assert scores[kept].min() >= scores[~kept].max()


@pytest.mark.parametrize("criterion", ["gradient", "taylor", "movement", "epsd"])
@pytest.mark.parametrize("structure", ["unstructured", "block"])
def test_gathered_scores_by_plain_gradients(criterion, structure, model_factory, batch):
    """Two optimizer steps, the first of two micro-batches."""
    reference, model = model_factory(**SURE), model_factory(**SURE).train()
    config = config_for(criterion, structure=structure, block_shape=(4, 8))
    mask_model(model, config)
    names = list(masked_layers(model))
    micro = halves(batch)
    for step in ([micro[0], micro[1]], [batch]):
        for rows in step:
            (model(**rows).loss / len(step)).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1e-6)  # the scores are those before the clipping
        gather(model, config)
    gradients = [dense_gradients(reference, rows, names) for rows in (*micro, batch)]
    for name in names:
        weight = reference.get_parameter(f"{name}.weight").detach()
        first = (gradients[0][name] + gradients[1][name]) / 2 * weight
        second = gradients[2][name] * weight
        if structure == "block":
            rows, columns = weight.shape
            first, second = (x.view(rows // 4, 4, columns // 8, 8).sum((1, 3)) for x in (first, second))
        expected = {
            "gradient": (first + second).abs(),
            "taylor": first**2 + second**2,
            "movement": -(first + second),
            "epsd": (first + second).abs(),
        }[criterion]
        layer = masked_layers(model)[name]
        torch.testing.assert_close(score_of(criterion, layer.score), expected, rtol=1e-3, atol=1e-9)
        assert int(layer.score_steps) == 2


def test_soft_movement_descends_along_loss_and_regularizer():
    config = config_for("soft_movement", sparsity_penalty=2.0, score_learning_rate=0.1)
    score = torch.randn(3, 4, requires_grad=True)
    sensitivity = torch.randn(3, 4)
    (2.0 * score.sigmoid().sum()).backward()
    expected = score - 0.1 * (sensitivity / sensitivity.square().mean().sqrt() + score.grad)
    found = CRITERIA["soft_movement"].update(score.detach(), sensitivity, config)
    torch.testing.assert_close(found, expected.detach())
    torch.testing.assert_close(score_of("soft_movement", score), score.sigmoid())


def test_l0_by_its_definition():
    """Louizos et al.: P(gate != 0) = sigmoid(log alpha - beta log(-gamma / zeta)); checked by drawing gates."""
    log_alpha = torch.tensor([-3.0, -1.0, 0.0, 2.0])
    torch.manual_seed(0)
    gates = sampled_gate(log_alpha.expand(40000, 4))
    assert bool(((gates >= 0) & (gates <= 1)).all())
    torch.testing.assert_close(score_of("l0", log_alpha), (gates > 0).float().mean(0), rtol=0, atol=0.01)
    expected = [min(1.0, max(0.0, 1.2 / (1 + math.exp(-value)) - 0.1)) for value in log_alpha.tolist()]
    torch.testing.assert_close(expected_gate(log_alpha), torch.tensor(expected))
    config = config_for("l0", sparsity_penalty=3.0, score_learning_rate=0.1)
    score = log_alpha.clone().requires_grad_()
    (3.0 * score_of("l0", score).sum()).backward()
    found = CRITERIA["l0"].update(log_alpha, torch.ones(4), config)
    torch.testing.assert_close(found, log_alpha - 0.1 * (1.0 + score.grad))


def test_l0_gates_multiply_and_learn():
    torch.manual_seed(0)
    layer = MaskedLinear(6, 4)
    layer.gather_scores(0.5, hard_concrete=True)
    rows = torch.randn(8, 6)
    torch.manual_seed(7)
    layer(rows).square().sum().backward()
    found = layer.take_sensitivity()
    torch.manual_seed(7)
    alpha = torch.full((4, 6), 0.5, requires_grad=True)
    functional.linear(rows, layer.weight * sampled_gate(alpha), layer.bias).square().sum().backward()
    torch.testing.assert_close(found, alpha.grad)
    assert layer.take_sensitivity() is None
    layer.eval()
    expected = functional.linear(rows, layer.weight * expected_gate(torch.tensor(0.5)), layer.bias)
    torch.testing.assert_close(layer(rows), expected)
    layer.score_steps += 1
    layer.settle()  # the gates go into the weights, once
    torch.testing.assert_close(layer(rows), expected)
    again = MaskedLinear(6, 4)
    again.gather_scores(0.5, hard_concrete=True)
    again.load_state_dict(layer.state_dict())
    again.settle()
    torch.testing.assert_close(again.eval()(rows), expected)


def test_movement_brings_back_what_moves_away_from_zero(model, batch):
    config = config_for("movement")
    found = mask_model(model.train(), config)
    layer = masked_layers(model)[LAYER]
    model(**batch).loss.backward()
    gather(model, config)
    prune_step(model, config, 0.5, found)
    first, values = layer.bit_mask.to_bool(), layer.weight.detach().clone()
    assert bool((layer.weight[~first] != 0).all())
    model(**batch).loss.backward()
    assert bool((layer._gate.grad[~first] != 0).any())  # pruned weights go on being scored
    layer.score[~first] = 100.0
    gather(model, config)
    prune_step(model, config, 0.5, found)
    second = layer.bit_mask.to_bool()
    assert bool((second & ~first).any())
    assert torch.equal(layer.weight, values)


def test_a_weight_criterion_gathers_nothing(model, batch):
    mask_model(model, SDPruneConfig())
    model.train()
    model(**batch).loss.backward()
    layer = masked_layers(model)[LAYER]
    assert layer.score is None
    assert layer.take_sensitivity() is None
    assert not any("score" in name for name in model.state_dict())


def test_which_criteria_need_gradients():
    assert set(SENSITIVITY_CRITERIA) == {name for name, each in CRITERIA.items() if each.update}


@pytest.mark.parametrize("criterion", SENSITIVITY_CRITERIA)
def test_no_gradient_yet_is_an_error(criterion, model):
    config = config_for(criterion)
    mask_model(model, config)
    with pytest.raises(ValueError, match=rf"criterion='{criterion}' ranks by gradients, but layer 'bert\.encoder"):
        prune_step(model, config, 0.5)
    assert masked_fraction(model) == 0.0


def test_scores_of_one_interval_are_forgotten_after_it(model, batch):
    config = config_for("taylor")
    mask_model(model.train(), config)
    model(**batch).loss.backward()
    gather(model, config)
    prune_step(model, config, 0.5)
    with pytest.raises(ValueError, match="has seen none since the last pruning step"):
        prune_step(model, config, 0.6)


def test_steps_that_overflow_are_left_out(model, batch):
    config = config_for("gradient")
    mask_model(model.train(), config)
    (model(**batch).loss * 1e4).backward()
    gather(model, config, scale=1e4)
    layer = masked_layers(model)[LAYER]
    expected = layer.score.clone()
    (model(**batch).loss * torch.inf).backward()
    gather(model, config)
    assert torch.equal(layer.score, expected)
    assert int(layer.score_steps) == 1


def scores_of(model, batch, criterion, structure, *, autocast=None, scale=1.0):
    """The scores after one step of two accumulated halves, clipped."""
    config = config_for(criterion, structure=structure, block_shape=(4, 8))
    mask_model(model.train(), config)
    torch.manual_seed(7)  # the gates of l0
    for half in halves(batch):
        with torch.autocast("cpu", autocast or torch.bfloat16, enabled=autocast is not None):
            loss = model(**half).loss / 2
        (loss * scale).backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1e-3)
    gather(model, config, scale=scale)
    return torch.cat([score_of(criterion, layer.score).flatten() for layer in masked_layers(model).values()])


@pytest.mark.parametrize("half", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("structure", ["unstructured", "block"])
@pytest.mark.parametrize("criterion", SENSITIVITY_CRITERIA)
def test_half_precision_ranks_as_single_precision_does(criterion, structure, half, model_factory, batch):
    scale = 1024.0 if half is torch.float16 else 1.0
    expected = scores_of(model_factory(**SURE), batch, criterion, structure)
    found = {
        "weights": scores_of(model_factory(**SURE).to(half), batch, criterion, structure, scale=scale),
        "autocast": scores_of(model_factory(**SURE), batch, criterion, structure, autocast=half, scale=scale),
    }
    for how, scores in found.items():
        assert scores.dtype == torch.float32, how
        assert torch.corrcoef(torch.stack((scores, expected)))[0, 1] > 0.98, how


@pytest.mark.parametrize("criterion", SENSITIVITY_CRITERIA)
def test_a_step_that_a_loss_scaler_skips_leaves_no_trace(criterion, model_factory, batch):
    """One layer overflows; the scaler skips the whole step, and so do the scores of all layers."""
    config, scores = config_for(criterion), []
    for overflow in ((False, False), (False, True, False)):
        model = model_factory(**SURE).train()
        mask_model(model, config)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        scaler = torch.amp.GradScaler("cpu", init_scale=256.0)
        for broken in overflow:
            torch.manual_seed(0)
            before = {name: value.detach().clone() for name, value in model.named_parameters()}
            with torch.autocast("cpu", torch.float16):
                loss = model(**batch).loss
            scaler.scale(loss).backward()
            if broken:
                layer = masked_layers(model)[LAYER]
                layer.weight.grad[0, 0] = layer._gate.grad[0, 0] = torch.inf
            scaler.unscale_(optimizer)
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            gather(model, config, scale=scaler.get_scale())
            scaler.step(optimizer)
            scaler.update()
            optimizer.zero_grad()
            assert broken is all(torch.equal(value, before[name]) for name, value in model.named_parameters())
        assert all(int(layer.score_steps) == 2 for layer in masked_layers(model).values())
        scores.append({name: layer.score for name, layer in masked_layers(model).items()})
    for name, score in scores[0].items():  # the scale is another now, and so is what rounds
        torch.testing.assert_close(scores[1][name], score, rtol=1e-2, atol=1e-2 * float(score.abs().max()))


@pytest.mark.parametrize("criterion", ["soft_movement", "l0"])
@pytest.mark.parametrize("size", [1e-30, 1e25, 0.0])
def test_trained_scores_do_not_depend_on_the_size_of_the_gradient(criterion, size):
    config, update = config_for(criterion), CRITERIA[criterion].update
    sensitivity = torch.randn(3, 4) if size else torch.zeros(3, 4)
    expected = update(torch.zeros(3, 4), sensitivity, config)
    torch.testing.assert_close(update(torch.zeros(3, 4), sensitivity * size, config), expected)


def small_model():
    torch.manual_seed(0)
    return torch.nn.Sequential(torch.nn.Linear(8, 16), torch.nn.Tanh(), torch.nn.Linear(16, 8))


def train_on(rows, rank, world, options):
    """Two steps with as many pruning steps; the loss is SDP-CC over the rows of all processes."""
    model, group = small_model(), torch.distributed.group.WORLD if world > 1 else None
    config = config_for(target_modules=r"\d", queue_size=0, **options)
    found = mask_model(model.train(), config)
    wrapped = torch.nn.parallel.DistributedDataParallel(model) if world > 1 else model
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    counts = torch.arange(12) != 3 if world == 1 else [torch.arange(6) != 3, torch.ones(6).bool()][rank]
    for step in range(2):  # later the scores of the small output are rounding
        # one process brings a row less, which holds NaN
        student, teacher = wrapped(rows)[:, None], rows[:, None].masked_fill(~counts[:, None, None], torch.nan)
        batch = BatchOutputs(config, {"tokens": student}, {"tokens": teacher}, counts[:, None], None, (), {}, group)
        distillation_terms(batch)["cross_correlation"].backward()
        gather(model, config)
        prune_step(model, config, 0.25 * (step + 1), found)
        optimizer.step()
        optimizer.zero_grad()
        zero_pruned(model)
    return {name: value.detach() for name, value in model.state_dict().items()}


RANKED = ({"criterion": "taylor", "structure": "block", "block_shape": (4, 4)}, {"criterion": "movement"})


def train_on_a_rank(folder, rows):
    torch.distributed.init_process_group("gloo")
    rank = torch.distributed.get_rank()
    torch.save([train_on(rows.chunk(2)[rank], rank, 2, options) for options in RANKED], folder / f"{rank}.pt")


def test_two_processes_end_with_the_masks_and_weights_of_one(tmp_path):
    rows = torch.randn(12, 8, generator=torch.Generator().manual_seed(1))
    spawn(train_on_a_rank, 2, tmp_path, rows)
    ranks = [torch.load(tmp_path / f"{rank}.pt") for rank in (0, 1)]
    for options, first, second in zip(RANKED, *ranks, strict=True):
        alone = train_on(rows, 0, 1, options)
        for name, value in alone.items():
            assert torch.equal(first[name], second[name]), name
            torch.testing.assert_close(first[name], value, rtol=1e-3, atol=1e-5)
