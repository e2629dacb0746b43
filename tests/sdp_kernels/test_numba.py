"""numba is asked by importing it: it is installed and refuses to be imported where NumPy is newer than it knows."""

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest

from sdp_kernels.cpu_engine.availability import _finds_numba

REFUSING = 'raise ImportError("Numba needs NumPy 2.4 or less. Got NumPy 2.5.")\n'
USE = """
import warnings
import torch
from sdp_kernels import BlockSparseMatrix, block_sparse_linear

matrix = BlockSparseMatrix.from_dense(torch.randn(64, 64), (32, 32))
rows = torch.randn(3, 64)
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    for _ in range(2):
        output = block_sparse_linear(rows, matrix, path="sparse")
torch.testing.assert_close(output, rows @ matrix.to_dense().T, rtol=1e-4, atol=1e-4)
print(*[warning.message for warning in caught], sep="\\n")
"""


@pytest.mark.parametrize(("content", "told"), [(REFUSING, "Got NumPy 2.5"), ("", "")])
def test_products_are_plain_torch_where_numba_cannot_be_imported(content: str, told: str, tmp_path: Path) -> None:
    if content:
        (tmp_path / "numba.py").write_text(content)
    elif importlib.util.find_spec("numba") is not None and not _finds_numba():
        pytest.skip("the numba that is installed cannot be imported")
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(tmp_path), str(Path(__file__).parents[2])])}
    done = subprocess.run([sys.executable, "-c", USE], capture_output=True, text=True, check=False, env=environment)
    assert done.returncode == 0, done.stderr
    lines = done.stdout.strip().splitlines()
    assert len(lines) == (1 if told else 0), "told once"
    assert told in done.stdout


INT8 = """
import sys
sys.modules["numba"] = None  # as where it is not installed
import importlib.util
real = importlib.util.find_spec
importlib.util.find_spec = lambda name, *rest: None if name == "numba" else real(name, *rest)
import warnings
import torch
from sdp_kernels import BlockSparseMatrix, block_sparse_linear
from sdp_kernels.block_sparse_linear import block_sparse_linear_reference

matrix = BlockSparseMatrix.from_dense(torch.randn(64, 64), (32, 4)).quantize()
rows = torch.randn(3, 64)
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    for _ in range(2):
        output = block_sparse_linear(rows, matrix)
assert torch.equal(output, block_sparse_linear_reference(rows, matrix))
print(*[warning.message for warning in caught], sep="\\n")
"""


def test_int8_products_say_once_that_they_are_plain_torch() -> None:
    done = subprocess.run([sys.executable, "-c", INT8], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == [
        "int8 products on a CPU are plain torch, slower than float32: "
        "numba is not installed (pip install 'sdprune[cpu]')"
    ]
