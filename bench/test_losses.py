"""Every grid on its smallest shapes: `pytest bench --benchmark-only`."""

import pytest
import torch
from pytest_benchmark.fixture import BenchmarkFixture

from bench.grid import DTYPES, Case, Grid
from bench.grids import GRIDS
from bench.machine import synchronize
from bench.runner import Step, require_gradients

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
SHAPES = 4  # of each grid


def few(grid: Grid) -> list[Case]:
    """The cases that take least memory."""
    return sorted(grid.cases(DEVICE), key=lambda case: grid.heaviest(case.shape).memory)[:SHAPES]


def uncompiled(grid: Grid) -> list[str]:
    """Ours and the first baseline; `python -m bench` has the compiled ones too, which take seconds to compile."""
    return [name for name in grid.contenders() if "compile" not in name][:2]


CASES = [
    pytest.param(grid, case, contender, id=f"{grid.name}-{'x'.join(map(str, case.shape))}-{case.dtype}-{contender}")
    for grid in GRIDS.values()
    for case in few(grid)
    for contender in uncompiled(grid)
]


@pytest.mark.benchmark(min_time=1e-4, max_time=0.2, min_rounds=3, warmup=False)
@pytest.mark.parametrize(("grid", "case", "contender"), CASES)
def test_loss(grid: Grid, case: Case, contender: str, device: torch.device, benchmark: BenchmarkFixture) -> None:
    benchmark.group = f"{grid.name} {'x'.join(map(str, case.shape))} {case.dtype}"
    inputs = grid.inputs(case.shape, DTYPES[case.dtype], device)
    step = Step(grid.contenders()[contender](inputs), require_gradients(grid, inputs))
    step()

    def call() -> list[torch.Tensor]:
        results = step()
        synchronize(device)
        return results

    assert all(result.isfinite().all() for result in benchmark(call))
