"""The cross-correlation loss over the rows of several processes, as under DDP.

Each rank holds some rows of one data set. The loss and the parameter gradients that DDP averages must be those
of one process with all rows.
"""

from itertools import pairwise
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from sdp_kernels import cross_correlation_loss
from tests.ranks import spawn

ROWS = (3, 5, 1)  # of each rank
DIM = 7

OPTIONS: tuple[dict[str, Any], ...] = ({}, {"target": "teacher", "off_diagonal_weight": 0.3}, {"form": "gram"})


def make_data(world_size: int) -> tuple[Tensor, Tensor, Tensor]:
    torch.manual_seed(1)
    rows = sum(ROWS[:world_size])
    weight = torch.rand(rows, dtype=torch.float64)
    weight[1] = 0
    return (
        torch.randn(rows, 4, dtype=torch.float64),
        torch.randn(rows, DIM, dtype=torch.float64),
        weight,
    )


def make_model() -> nn.Linear:
    torch.manual_seed(0)
    return nn.Linear(4, DIM, dtype=torch.float64)


def check(weighted: bool, options: dict[str, Any]) -> None:
    rank, world_size = dist.get_rank(), dist.get_world_size()
    inputs, teacher, weight = make_data(world_size)
    bounds = [sum(ROWS[:index]) for index in range(world_size + 1)]
    start, stop = list(pairwise(bounds))[rank]

    single = make_model()
    expected = cross_correlation_loss(single(inputs), teacher, sample_weight=weight if weighted else None, **options)
    expected.backward()

    model = DistributedDataParallel(make_model())
    loss = cross_correlation_loss(
        model(inputs[start:stop]),
        teacher[start:stop],
        sample_weight=weight[start:stop] if weighted else None,
        process_group=dist.group.WORLD,
        **options,
    )
    loss.backward()
    torch.testing.assert_close(loss, expected)
    for got, want in zip(model.parameters(), single.parameters(), strict=True):
        torch.testing.assert_close(got.grad, want.grad)


def check_inputs() -> None:
    """Gradients of the inputs, the teacher's included, are world_size times those of one process."""
    rank, world_size = dist.get_rank(), dist.get_world_size()
    _, teacher, _ = make_data(world_size)
    student = torch.randn(teacher.shape, dtype=torch.float64)
    start = sum(ROWS[:rank])
    stop = start + ROWS[rank]
    whole = student.clone().requires_grad_(), teacher.clone().requires_grad_()
    own = student[start:stop].requires_grad_(), teacher[start:stop].requires_grad_()
    expected = torch.autograd.grad(cross_correlation_loss(*whole), whole)
    got = torch.autograd.grad(cross_correlation_loss(*own, process_group=dist.group.WORLD), own)
    for part, gradient in zip(got, expected, strict=True):
        torch.testing.assert_close(part, world_size * gradient[start:stop])


def check_on_a_rank() -> None:
    dist.init_process_group("gloo")
    for weighted in (False, True):
        for options in OPTIONS:
            check(weighted, options)
    check_inputs()


@pytest.mark.skipif(
    not torch.distributed.is_available() or not torch.distributed.is_gloo_available(),
    reason="this torch has no gloo",
)
@pytest.mark.parametrize("world_size", [2, 3])
def test_equals_one_process_with_all_rows(world_size: int) -> None:
    spawn(check_on_a_rank, world_size)
