"""What is compared, and how far apart it is."""

import pytest
import torch

from sdp_kernels import cosine_distance_loss, cross_correlation_loss, kl_divergence_loss
from sdprune import SDPruneConfig
from sdprune.distillation.objectives import OBJECTIVES, distillation_terms, represent
from sdprune.distillation.teacher import Signals


def make_signals(seed: int, pooled: bool = True) -> Signals:
    generator = torch.Generator().manual_seed(seed)
    return Signals(
        torch.randn(6, 3, generator=generator),
        torch.randn(6, 5, 8, generator=generator),
        torch.randn(6, 8, generator=generator) if pooled else None,
    )


RIGHT = torch.tensor(
    [[1, 1, 1, 0, 0], [1, 1, 1, 1, 1], [1, 0, 0, 0, 0], [1, 1, 0, 0, 0], [1, 1, 1, 1, 0], [1, 1, 1, 1, 1]]
)
LEFT = RIGHT.flip(1)


@pytest.mark.parametrize("mask", [RIGHT, LEFT, None], ids=["right", "left", "none"])
def test_representations_leave_padding_out(mask):
    signals = make_signals(0)
    rows = [signals.hidden[i][mask[i].bool()] if mask is not None else signals.hidden[i] for i in range(6)]
    first, weight = represent(signals, mask, "first")
    assert weight is None
    torch.testing.assert_close(first, torch.stack([row[0] for row in rows]))
    mean, _ = represent(signals, mask, "mean")
    torch.testing.assert_close(mean, torch.stack([row.mean(0) for row in rows]))
    tokens, weight = represent(signals, mask, "tokens")
    kept = tokens if weight is None else tokens[weight.bool()]
    torch.testing.assert_close(kept, torch.cat(rows))
    assert represent(signals, mask, "pooled")[0] is signals.pooled


def test_pooled_needs_a_pooler_and_masks_need_their_length():
    with pytest.raises(ValueError, match="the model has no pooler; choose first, mean or tokens"):
        represent(make_signals(0, pooled=False), RIGHT, "pooled")
    with pytest.raises(ValueError, match=r"attention mask has shape \(6, 4\), the last hidden state \(6, 5, 8\)"):
        represent(make_signals(0), RIGHT[:, :4], "tokens")


def test_objectives_are_the_public_losses():
    student, teacher = make_signals(0), make_signals(1)
    config = SDPruneConfig(
        distillation={"cross_correlation": 1.0, "kl": 1.0, "cosine": 1.0}, temperature=3.0, representation="first"
    )
    terms = distillation_terms(student, teacher, RIGHT, config)
    rows = student.hidden[:, 0], teacher.hidden[:, 0]
    torch.testing.assert_close(terms["cross_correlation"], cross_correlation_loss(*rows) / 8)
    torch.testing.assert_close(terms["cosine"], cosine_distance_loss(*rows))
    torch.testing.assert_close(terms["kl"], kl_divergence_loss(student.logits, teacher.logits, temperature=3.0))
    assert list(terms) == list(OBJECTIVES)


@pytest.mark.parametrize(
    "change", [{"off_diagonal_weight": 0.7}, {"correlation_target": "teacher"}, {"temperature": 9.0}], ids=str
)
def test_every_option_is_used(change):
    student, teacher = make_signals(0), make_signals(1)
    base = SDPruneConfig(distillation={"cross_correlation": 1.0, "kl": 1.0})
    changed = SDPruneConfig(distillation={"cross_correlation": 1.0, "kl": 1.0}, **change)
    before, after = (distillation_terms(student, teacher, RIGHT, config) for config in (base, changed))
    assert any(not torch.allclose(before[name], after[name]) for name in before)


def test_padding_does_not_touch_the_losses():
    config = SDPruneConfig(distillation={"cross_correlation": 1.0, "cosine": 1.0}, representation="tokens")
    student, teacher = make_signals(0), make_signals(1)
    before = distillation_terms(student, teacher, RIGHT, config)
    student.hidden[RIGHT == 0] = torch.nan
    teacher.hidden[RIGHT == 0] = 1e9
    after = distillation_terms(student, teacher, RIGHT, config)
    for name, value in before.items():
        torch.testing.assert_close(after[name], value)


def test_a_single_row_adds_nothing():
    signals = Signals(torch.randn(1, 2), torch.randn(1, 4, 8, requires_grad=True), None)
    config = SDPruneConfig(representation="first")
    loss = distillation_terms(signals, signals, None, config)["cross_correlation"]
    loss.backward()
    assert loss == 0
    assert bool((signals.hidden.grad == 0).all())
