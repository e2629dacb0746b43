"""What is found without a GPU is what is launched."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]

# The same case once on tensors without values and once on real ones, whose launches are written down too: it launches
# the same kernels. On a CPU the real ones go as far as the first launch whose result is looked at.
COMPARE = """
import torch
from bench.grid import Case
from bench.grids import GRIDS
from bench.launches import _Implementations, launches_of
from bench.runner import Step, require_gradients
from sdp_kernels import dispatch, use_backend
from sdp_kernels.compile_ahead import recorded, target_gpu

SHAPES = {
    "block_sparse": [(5, 64, 96, 16, 32, 50), (300, 128, 64, 64, 64, 100)],
    "masked_linear": [(5, 64, 96, 50, 0), (300, 64, 128, 10, 32), (300, 96, 64, 100, 32)],
    "training_step": [(40, 64, 128, 1, 25, 32)],
    "cross_correlation": [(20, 96), (200, 96), (40, 700)],
    "kl_divergence": [(7, 5), (7, 5000)],
    "cosine_distance": [(7, 5), (7, 5000)],
    "select_mask": [(3, 64, 96)],
    "alignment": [(64, 96)],
}
dispatch._interpreting = lambda: True  # kernels take CPU tensors, as they are only written down
dispatch.capability_of.__code__ = (lambda device: 90).__code__
for name, grid in GRIDS.items():
    for shape in SHAPES[name]:
        for contender in grid.launching:
            inputs = grid.inputs(shape, torch.float32, torch.device("cpu"))
            leaves = require_gradients(grid, inputs)
            with target_gpu(90), recorded() as found, use_backend("triton"):
                step = Step(grid.contenders()[contender](inputs), leaves)
                try:
                    step()
                except ValueError as error:
                    assert "NaN" in str(error) or "lose all" in str(error), error
            real = set(found)
            assert real, (name, shape)
            one = type(grid)(**{**vars(grid), "launching": (contender,), "outlines": grid.outlines})
            rehearsed = launches_of(one, Case(shape, "fp32", 0), 90)
            assert {launch.name for launch in rehearsed} >= real, (name, shape, contender, real)
            assert all(launch.programs > 0 for launch in rehearsed)
            print(name, shape, contender, len(real), "of", len({launch.name for launch in rehearsed}))
"""


def test_rehearsed_launches_are_those_of_real_tensors() -> None:
    pytest.importorskip("triton")
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, "-c", COMPARE], capture_output=True, text=True, check=False, env=environment, cwd=ROOT
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert len(done.stdout.splitlines()) == 16
