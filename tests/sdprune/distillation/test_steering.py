"""The distillation weight follows the gradients, slowly and within bounds."""

import pytest
import torch

from sdprune.distillation.steering import gradient_norm, steered_weight


def test_the_weight_settles_at_the_ratio():
    weight = 1.0
    for _ in range(20):
        weight = steered_weight(weight, 3.0, 0.1, ratio=0.5, initial=1.0)
    assert weight * 0.1 == pytest.approx(0.5 * 3.0)


@pytest.mark.parametrize(
    ("task", "distillation", "expected"),
    [(1.0, 0.0, 2.0), (1.0, 1e-9, 2.0), (0.0, 1.0, 0.5), (0.0, 0.0, 1.0), (1.0, 1.6, 0.625), (1.0, 1e9, 0.5)],
)
def test_one_measurement_changes_it_by_two_at_most(task, distillation, expected):
    assert steered_weight(1.0, task, distillation, ratio=1.0, initial=1.0) == pytest.approx(expected)


def test_it_stays_within_its_range():
    up = down = 0.3
    for _ in range(40):
        up = steered_weight(up, 1.0, 0.0, ratio=1.0, initial=0.3)
        down = steered_weight(down, 0.0, 1.0, ratio=1.0, initial=0.3)
    assert (up, down) == pytest.approx((300.0, 3e-4))


def test_gradient_norm_of_all_parameters_together():
    left, right, unused = (torch.randn(3, 4, requires_grad=True) for _ in range(3))
    loss = (left * 2).sum() + (right * torch.arange(4.0)).sum()
    expected = torch.cat((torch.full((12,), 2.0), torch.arange(4.0).repeat(3))).norm()
    torch.testing.assert_close(gradient_norm(loss, [left, right, unused]), expected)
    assert gradient_norm(loss.detach() + left.sum(), [unused]) == 0
    loss.backward()  # its graph is still there
