"""What is compared, and how far apart it is."""

import pytest
import torch

from sdp_kernels import (
    BitMask,
    aligned_weight_loss,
    cosine_distance_loss,
    cross_correlation_loss,
    kl_divergence_loss,
)
from sdprune import SDPruneConfig
from sdprune.distillation.terms import BatchOutputs, distillation_terms, feature_names
from sdprune.masking.pruner import mask_model, prune_step
from sdprune.masking.swap import masked_layers

MASK = torch.tensor(
    [[1, 1, 1, 0, 0], [1, 1, 1, 1, 1], [1, 0, 0, 0, 0], [1, 1, 0, 0, 0], [1, 1, 1, 1, 0], [1, 1, 1, 1, 1]]
).bool()
NOTHING = torch.nn.Identity()


def features(seed, **shapes):
    generator = torch.Generator().manual_seed(seed)
    return {name.replace("_at_", "@"): torch.randn(shape, generator=generator) for name, shape in shapes.items()}


def compare(config, student, teacher, tokens=MASK, positions=None, models=(NOTHING, NOTHING), queues=None):
    queues = {} if queues is None else queues
    return distillation_terms(BatchOutputs(config, student, teacher, tokens, positions, models, queues))


def pair(**shapes):
    return features(0, **shapes), features(1, **shapes)


def test_objectives_are_the_public_losses():
    student, teacher = pair(logits=(6, 3), first=(6, 8))
    names = ("cross_correlation", "kl", "cosine", "mse")
    config = SDPruneConfig(
        distillation=dict.fromkeys(names, 1.0), temperature=3.0, representation="first", center=False
    )
    terms = compare(config, student, teacher)
    rows = student["first"], teacher["first"]
    torch.testing.assert_close(terms["cross_correlation"], cross_correlation_loss(*rows, center=False) / 8)
    torch.testing.assert_close(terms["cosine"], cosine_distance_loss(*rows))
    torch.testing.assert_close(terms["mse"], torch.nn.functional.mse_loss(*rows))
    torch.testing.assert_close(terms["kl"], kl_divergence_loss(student["logits"], teacher["logits"], temperature=3.0))
    assert tuple(terms) == names


@pytest.mark.parametrize(
    "change",
    [{"off_diagonal_weight": 0.7}, {"correlation_target": "teacher"}, {"temperature": 9.0}, {"center": False}],
    ids=str,
)
def test_every_option_is_used(change):
    student, teacher = pair(logits=(6, 3), tokens=(6, 5, 8))
    fields = {"distillation": {"cross_correlation": 1.0, "kl": 1.0}}
    before, after = (compare(SDPruneConfig(**fields, **more), student, teacher) for more in ({}, change))
    assert any(not torch.allclose(before[name], after[name]) for name in before)


def test_features_that_are_needed():
    def names(**fields):
        return feature_names(SDPruneConfig(**fields))

    assert names(distillation=None) == ()
    assert names(distillation="aligned_cosine") == ()
    assert names(distillation="kl", representation="mean") == ("logits",)
    assert names(distillation={"kl": 1, "mse": 1}, representation="logits") == ("logits",)
    assert names(distillation={"kl": 1, "cosine": 1}, representation="mean", hidden_layers=(2, -1)) == (
        "logits",
        "mean@2",
        "mean@-1",
    )
    own = {"mse@logits": 1, "cosine": 1, "cross_correlation@first": 1, "mse@tokens@-2": 1, "mse@pooled": 1}
    assert names(distillation=own, representation="mean") == ("logits", "mean", "first", "tokens@-2", "pooled")
    assert names(distillation=own, representation="mean", hidden_layers=(1, 2)) == (
        *("logits", "mean@1", "mean@2", "first@1", "first@2", "tokens@-2", "pooled"),
    )
    assert names(distillation={"kl": 1, "cosine@first": 1}, representation="pooled", hidden_layers=(1,)) == (
        "logits",
        "first@1",
    )


@pytest.mark.parametrize("name", ["cross_correlation", "cosine", "mse"])
def test_every_term_compares_what_it_names(name):
    shapes = {"logits": (6, 3), "tokens": (6, 5, 8), "first": (6, 8), "mean_at_1": (6, 8)}
    student, teacher = pair(**shapes)
    own = [f"{name}@{feature}" for feature in ("logits", "first", "mean@1")]
    terms = compare(SDPruneConfig(distillation=dict.fromkeys([name, *own], 1.0)), student, teacher)
    assert tuple(terms) == (name, *own)
    assert len({value.item() for value in terms.values()}) == 4
    for term in own:
        feature = term.split("@", 1)[1]
        alone = {"tokens": student[feature]}, {"tokens": teacher[feature]}
        torch.testing.assert_close(terms[term], compare(SDPruneConfig(distillation=name), *alone)[name])


@pytest.mark.parametrize("name", ["cross_correlation", "cosine", "mse"])
def test_chosen_layers_are_averaged(name):
    student, teacher = pair(**{"mean_at_1": (6, 8), "mean_at_2": (6, 8)})
    one, two, both = (
        compare(SDPruneConfig(distillation=name, representation="mean", hidden_layers=layers), student, teacher)[name]
        for layers in ((1,), (2,), (1, 2))
    )
    assert not torch.allclose(one, two)
    torch.testing.assert_close(both, (one + two) / 2)


@pytest.mark.parametrize("name", ["cross_correlation", "cosine", "mse"])
def test_padding_does_not_touch_the_losses(name):
    config = SDPruneConfig(distillation=name, representation="tokens")
    student, teacher = pair(tokens=(6, 5, 8))
    oracle = {key: value[MASK] for key, value in student.items()}, {key: value[MASK] for key, value in teacher.items()}
    expected = compare(config, *oracle, tokens=None)[name]
    student["tokens"][~MASK] = torch.nan
    teacher["tokens"][~MASK] = torch.nan
    student["tokens"].requires_grad_()
    loss = compare(config, student, teacher)[name]
    torch.testing.assert_close(loss, expected)
    loss.backward()
    gradient = student["tokens"].grad
    assert gradient[MASK].isfinite().all()
    assert gradient[MASK].abs().sum() > 0
    assert (gradient[~MASK] == 0).all()


def test_logits_that_do_not_count_are_left_out():
    student, teacher = pair(logits=(6, 5, 3))
    config = SDPruneConfig(distillation={"kl": 1.0, "mse": 1.0}, representation="logits")
    terms = compare(config, student, teacher, tokens=None, positions=MASK)
    rows = student["logits"][MASK], teacher["logits"][MASK]
    torch.testing.assert_close(terms["kl"], kl_divergence_loss(*rows, temperature=2.0))
    torch.testing.assert_close(terms["mse"], torch.nn.functional.mse_loss(*rows))


@pytest.mark.parametrize("mask", [None, torch.tensor([[True, False, False, False]])], ids=["one row", "one token"])
def test_a_single_row_adds_nothing(mask):
    kind = "first" if mask is None else "tokens"
    student = {kind: torch.randn((1, 8) if mask is None else (1, 4, 8)).requires_grad_()}
    loss = compare(SDPruneConfig(representation=kind), student, student, tokens=mask)["cross_correlation"]
    loss.backward()
    assert loss == 0
    assert bool((student[kind].grad == 0).all())


@pytest.mark.parametrize("name", ["cross_correlation", "kl", "cosine", "mse"])
def test_a_batch_in_which_nothing_counts_adds_nothing(name):
    """As on a GPU, where the losses do not look: say a batch of prompts that were cut before their answers."""
    nothing = torch.zeros(2, 4, dtype=torch.bool)
    student, teacher = pair(logits=(2, 4, 3))
    student["logits"].requires_grad_()
    config = SDPruneConfig(distillation=name, representation="logits")
    loss = compare(config, student, teacher, tokens=None, positions=nothing)[name]
    loss.backward()
    assert loss == 0
    assert (student["logits"].grad == 0).all()


def test_the_queue_adds_earlier_rows_without_padding():
    config = SDPruneConfig(queue_size=64, representation="tokens")
    queues = {}
    earlier, now = pair(tokens=(6, 5, 8)), (features(2, tokens=(6, 5, 8)), features(3, tokens=(6, 5, 8)))
    compare(config, *earlier, queues=queues)
    loss = compare(config, *now, queues=queues)["cross_correlation"]
    rows = [torch.cat((n["tokens"][MASK], e["tokens"][MASK])) for n, e in zip(now, earlier, strict=True)]
    torch.testing.assert_close(loss, cross_correlation_loss(*rows) / 8)


def test_every_term_has_a_queue_of_its_own():
    """Also where two terms read the same rows: neither sees those of the batch twice."""
    names = ("cross_correlation", "cross_correlation@first", "cross_correlation@tokens")
    together = SDPruneConfig(queue_size=64, distillation=dict.fromkeys(names, 1.0))
    batches = [pair(tokens=(6, 5, 8), first=(6, 8)), (features(2, tokens=(6, 5, 8), first=(6, 8)),) * 2]
    queues = {}
    terms = [compare(together, *batch, queues=queues) for batch in batches][-1]
    for name in names:
        alone = {}
        config = SDPruneConfig(queue_size=64, distillation=name)
        expected = [compare(config, *batch, queues=alone)[name] for batch in batches][-1]
        torch.testing.assert_close(terms[name], expected, rtol=0, atol=0)


def test_aligned_weights_are_those_of_the_masks(model_factory):
    config = SDPruneConfig(
        target_sparsity=0.5, pruning_steps=1, distillation={"aligned_cosine": 1.0, "aligned_frobenius": 1.0}
    )
    student, teacher = model_factory(), model_factory(1)
    mask_model(student, config)
    prune_step(student, config, 0.5)
    terms = compare(config, {}, {}, models=(student, teacher))
    layers = masked_layers(student)
    assert len(layers) == 12
    weights = [layer.weight * layer.bit_mask.to_bool() for layer in layers.values()]
    references = [teacher.get_parameter(f"{name}.weight") for name in layers]
    for kind in ("cosine", "frobenius"):
        torch.testing.assert_close(terms[f"aligned_{kind}"], aligned_weight_loss(weights, references, kind=kind))
    assert all(isinstance(layer.bit_mask, BitMask) for layer in layers.values())
    terms["aligned_cosine"].backward()
    layer = next(iter(layers.values()))
    assert (layer.weight.grad[~layer.bit_mask.to_bool()] == 0).all()
