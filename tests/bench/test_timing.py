"""Memory as it is counted, on tensors of known size."""

from collections.abc import Callable
from functools import partial

import pytest
import torch
from torch import Tensor

from bench.grids.cross_correlation import eager
from bench.runner import Step
from bench.timing import _times_to_fill, measure, peak_mib
from sdp_kernels import cross_correlation_loss

CPU = torch.device("cpu")
MIB = 2**18  # float32 in a MiB


@pytest.fixture(autouse=True)
def _quiet_profiler(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KINETO_LOG_LEVEL", "6")


def test_peak_is_what_lives_at_once() -> None:
    def one_after_another() -> None:
        for _ in range(3):
            torch.ones(MIB)

    def together() -> list[Tensor]:
        return [torch.ones(MIB) for _ in range(3)]

    assert peak_mib(one_after_another, CPU) == pytest.approx(1, rel=0.01)
    assert peak_mib(together, CPU) == pytest.approx(3, rel=0.01)


def test_the_published_loss_holds_matrices_that_ours_does_not() -> None:
    torch.manual_seed(0)
    student, teacher = torch.randn(32, 1024, requires_grad=True), torch.randn(32, 1024)

    def peak(loss: Callable[..., Tensor]) -> float:
        return peak_mib(Step(partial(loss, student, teacher), [student]), CPU)

    matrix = 1024 * 1024 / MIB
    assert 4 * matrix <= peak(eager) < 5 * matrix
    assert peak(cross_correlation_loss) < matrix / 2


def test_contenders_take_turns() -> None:
    turns = []
    measure({name: partial(turns.append, name) for name in "abc"}, CPU, seconds=0.0)
    assert "".join(turns) == 6 * "abc"


def test_the_first_and_slowest_time_does_not_count() -> None:
    walls = iter([1e-2, 1e-4, 2e-4])
    assert _times_to_fill(0.95, lambda: next(walls)) == 11


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_gpu_time_is_that_of_a_graph_or_of_launches_that_follow_each_other() -> None:
    device = torch.device("cuda")
    values = torch.ones(2**20, device=device)
    for graph, steps in (
        (True, {"sum": values.sum}),
        (False, {"sum": values.sum, "waits": lambda: values.sum().item()}),
    ):
        for taken in measure(steps, device, seconds=0.01, graph=graph).values():
            assert taken.how == ("graph" if graph else "events")
            assert 0 < taken.p20 <= taken.median <= taken.p80
            assert taken.host is not None
    matrices = 3 * 4 * 2**20
    assert peak_mib(lambda: [torch.ones_like(values) for _ in range(3)], device) == pytest.approx(matrices / 2**20)
