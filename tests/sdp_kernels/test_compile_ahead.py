"""Every kernel compiles for GPUs that are not there; `python -m bench resources` does it for all configurations."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from sdp_kernels.registry import SPECS

MODULES = sorted({spec.kernel_module for spec in SPECS.values() if spec.kernel_module})
COMPILE = """
import sys
from bench.resources import compile_config, configurations, label, reasons_against

for capability in (80, 120):
    first_of_each_kernel = {}
    for config in configurations(sys.argv[1], capability):
        first_of_each_kernel.setdefault(config.kernel.fn.__qualname__ + config.kernel.fn.__module__, config)
    for config in first_of_each_kernel.values():
        reasons = reasons_against(config, capability, compile_config(config, capability))
        assert not reasons, (label(config), capability, reasons)
print(len(first_of_each_kernel), "kernels")
"""


@pytest.mark.parametrize("module", MODULES)
def test_kernels_compile_ahead_of_time(module: str) -> None:
    """In a process of its own, because this one may interpret kernels instead of compiling them."""
    pytest.importorskip("triton")
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    root = Path(__file__).parents[2]
    command = [sys.executable, "-c", COMPILE, module]
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment, cwd=root)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout.split()[0]) >= 1


def run(code: str, folder: Path) -> str:
    """Run Python with kernels that are compiled, into a cache of its own."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["TRITON_CACHE_DIR"] = str(folder / "cache")
    environment["PYTHONPATH"] = os.pathsep.join([str(Path(__file__).parents[2]), str(folder)])
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=False, env=environment, cwd=folder
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


FILL = """
import importlib, os, torch
from pathlib import Path
from sdp_kernels.compile_ahead import compile_ahead, recorded, target_gpu

kernels = importlib.import_module("sdp_kernels.distillation.kernel")
def files():
    return {path for path in Path(os.environ["TRITON_CACHE_DIR"]).rglob("*") if path.is_file()}

with target_gpu(90), recorded() as found:
    for columns in (10, 12, 500):
        logits = torch.empty(64, columns, device="meta")
        kernels.row_losses(logits, logits, None, "kl", 2.0)
assert len(found) == 2, found  # both narrow ones are one
assert not files()
told = []
results = compile_ahead(found.values(), processes=2, done=told.append)
assert told == results and len(results) == 2, results
assert [each.error for each in results] == [None, None], results
there = files()
assert there
with target_gpu(90):
    for columns in (10, 500):
        logits = torch.empty(64, columns, device="meta")
        sizes = kernels.tile(columns)
        compiled = kernels._kl_forward_kernel.warmup(
            *kernels.as_rows(logits), *kernels.as_rows(logits), *[torch.empty(64, device="meta")] * 2,
            torch.empty(64, 4, device="meta"), 64, columns, 2.0, HAS_WEIGHT=False, **sizes, grid=(1,),
        )
        assert compiled.metadata.target.arch == 90
assert files() == there, "the launches found everything compiled"
assert compile_ahead([]) == []
assert compile_ahead(found.values(), seconds=0.0) == [], "no time, no result"
"""

BROKEN = """
import os, torch, triton, triton.language as tl

if os.environ.get("DIE"):
    os._exit(3)

@triton.jit
def broken(x, N: tl.constexpr):
    tl.store(x + tl.arange(0, N), 0.0)  # N must be a power of two

@triton.jit
def sound(x, N: tl.constexpr):
    tl.store(x + tl.arange(0, N), 0.0)
"""

USE_BROKEN = """
import os, torch
from sdp_kernels.compile_ahead import compile_ahead, recorded, target_gpu
import planted

with target_gpu(80), recorded() as found:
    planted.broken[(1,)](torch.empty(4, device="meta"), N=3)
    planted.sound[(1,)](torch.empty(4, device="meta"), N=4)
broken, sound = compile_ahead(found.values(), processes=1)
assert "power of 2" in broken.error and "\\n" not in broken.error, broken
assert sound.error is None, sound
os.environ["DIE"] = "1"
(lost,) = compile_ahead(found.values(), processes=1)
assert lost.error == "the compiling process ended", lost
"""


def test_launches_find_what_was_compiled_ahead(tmp_path: Path) -> None:
    pytest.importorskip("triton")
    run(FILL, tmp_path)


def test_what_does_not_compile_is_told_and_stops_nothing(tmp_path: Path) -> None:
    pytest.importorskip("triton")
    (tmp_path / "planted.py").write_text(BROKEN)
    run(USE_BROKEN, tmp_path)


TUNED = """
import torch
from sdp_kernels import BlockSparseMatrix
from sdp_kernels.block_sparse_linear import launch, tuning
from sdp_kernels.compile_ahead import target_gpu
from sdp_kernels.masks import Walk
import importlib
from bench.grids import GRIDS

kernel = importlib.import_module("sdp_kernels.block_sparse_linear.kernel")
inputs = GRIDS["block_sparse"].outlines((64, 768, 3072, 32, 32, 10), torch.bfloat16)
matrix = inputs["pattern"]
walk = Walk(matrix.crow_indices, matrix.col_indices)
key = launch.ProductClass.of(64, matrix.shape, matrix.block_shape, torch.bfloat16)
tried = list(tuning.candidates(64, 32, torch.bfloat16, 90))
call = lambda: kernel.product(inputs["input"], matrix.values, None, walk, matrix.lists.row_order, matrix.shape[0], None)
with target_gpu(90):
    found = tuning.recorded_launches(call, key, tried)
products = {(each.launch, each.splits > 1) for each in tried}  # how many programs share a row is no constant
print(len(tried), len(products), len(found), len(launch.TUNED))
"""


def test_all_candidates_of_a_tuning_are_known_before_any_is_timed(tmp_path: Path) -> None:
    pytest.importorskip("triton")
    tried, products, found, left = map(int, run(TUNED, tmp_path).split())
    assert tried > products > 20
    assert found in (products + 1, products + 2), "and the kernel that adds what is shared, and perhaps the default"
    assert left == 0


SIZES = """
from bench.grid import Case
from bench.grids import GRIDS
from bench.launches import launches_of

ALIKE = {
    "block_sparse": [(rows, 768, 3072, 32, 32, 50) for rows in (1000, 1001, 1008)],
    "masked_linear": [(rows, 768, 3072, 10, 32) for rows in (1000, 1001, 1008)],
    "training_step": [(rows, 768, 3072, 1, 10, 32) for rows in (1000, 1001, 1008)],
    "cross_correlation": [(rows, 768) for rows in (1000, 1001, 1008)],
    "kl_divergence": [(rows, 512) for rows in (1, 101, 112)],
    "cosine_distance": [(rows, 512) for rows in (1, 101, 112)],
    "select_mask": [(tensors, rows, 768) for tensors, rows in ((1, 64), (7, 65), (4, 80))],
    "alignment": [(rows, 768) for rows in (101, 112)],
}
for name, grid in GRIDS.items():
    names = [{launch.name for launch in launches_of(grid, Case(shape, "fp32", 0), 90)} for shape in ALIKE[name]]
    assert names[0] and all(other == names[0] for other in names), (name, [len(each) for each in names])
few = [(1, 768, 3072, 50, 0), (15, 768, 3072, 50, 0), (16, 768, 3072, 50, 0)]
names = [{launch.name for launch in launches_of(GRIDS["masked_linear"], Case(shape, "fp32", 0), 90)} for shape in few]
assert names[0] == names[1] == names[2]
"""


def test_numbers_of_rows_have_no_kernels_of_their_own(tmp_path: Path) -> None:
    """One row, sixteen and any other number, and slices that begin anywhere, take the same compiled kernels."""
    pytest.importorskip("triton")
    run(SIZES, tmp_path)
