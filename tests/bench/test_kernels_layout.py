"""The Hub's `kernels` layout: loads from a local path, alone and beside our own package, to the same results."""

import ast
import json
import subprocess
import sys

import pytest
import torch
from torch.nn import functional

import sdp_kernels
from bench.__main__ import main
from bench.kernels_layout import MODULE, write_kernel_repository

needs_kernels = pytest.mark.skipif(
    not __import__("importlib.util").util.find_spec("kernels"),
    reason="needs the extra hub-kernels: pip install 'sdprune[hub-kernels]'",
)


@pytest.fixture(scope="module")
def repository(tmp_path_factory):
    return write_kernel_repository(tmp_path_factory.mktemp("hub") / "sdp-block-sparse")


def test_no_file_names_our_package(repository):
    files = sorted((repository / "build" / "torch-universal" / MODULE).rglob("*.py"))
    assert len(files) > 10
    for path in files:
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ImportFrom) and node.level == 0:
                assert node.module.split(".")[0] not in ("sdp_kernels", "sdprune"), path
        assert '"sdp_kernels::' not in path.read_text()
    assert {path.suffix for path in repository.rglob("*") if path.is_file()} == {".py", ".json", ".md"}
    assert not any(path.stem == "spec" and path.parent.name == "block_sparse_linear" for path in files)


@needs_kernels
def test_beside_our_own_package(repository):
    from kernels import get_local_kernel

    kernel = get_local_kernel(repository)
    assert kernel.block_sparse_linear is not sdp_kernels.block_sparse_linear
    weight = torch.randn(64, 96) * (torch.rand(4, 6) < 0.4).repeat_interleave(16, 0).repeat_interleave(16, 1)
    rows = torch.randn(5, 96)
    results = []
    for package in (kernel, sdp_kernels):
        matrix = package.BlockSparseMatrix.from_dense(weight, (16, 16))
        input = rows.clone().requires_grad_()
        output = package.block_sparse_linear(input, matrix, activation="relu", path="sparse")
        output.square().sum().backward()
        results.append((output.detach(), input.grad))
    for found, expected in zip(*results, strict=True):
        assert torch.equal(found, expected)
    torch.testing.assert_close(results[0][0], functional.linear(rows, weight).relu())
    namespace = json.loads((repository / "build" / "torch-universal" / "metadata.json").read_text())["id"]
    assert hasattr(getattr(torch.ops, namespace), "block_sparse_linear")


@needs_kernels
def test_without_our_package(repository):
    """In a process that cannot import it."""
    code = """
import sys
sys.modules["sdp_kernels"] = sys.modules["sdprune"] = None
import pathlib, torch, kernels
kernel = kernels.get_local_kernel(pathlib.Path(sys.argv[1]))
weight = torch.randn(32, 32)
weight[:16] = 0
matrix = kernel.BlockSparseMatrix.from_dense(weight, (16, 16))
rows = torch.randn(3, 32)
for backend in ("reference", "cpu"):
    with kernel.use_backend(backend):
        torch.testing.assert_close(kernel.block_sparse_linear(rows, matrix), rows @ weight.T)
print(sorted(kernel.__all__))
"""
    process = subprocess.run([sys.executable, "-c", code, str(repository)], capture_output=True, text=True, check=False)
    assert process.returncode == 0, process.stderr
    assert process.stdout.strip() == "['BlockSparseMatrix', 'block_sparse_linear', 'use_backend']"


def test_an_occupied_folder_is_left_alone(repository, capsys):
    with pytest.raises(ValueError, match="already exists"):
        write_kernel_repository(repository)
    assert main(["kernels-layout", str(repository)]) == 2
    assert "already exists" in capsys.readouterr().err


def test_the_command_writes_it(repository, tmp_path, capsys):
    assert main(["kernels-layout", str(tmp_path / "new")]) == 0
    assert capsys.readouterr().out.strip() == str(tmp_path / "new")
    written = {path.relative_to(tmp_path / "new") for path in (tmp_path / "new").rglob("*.py")}
    assert written == {path.relative_to(repository) for path in repository.rglob("*.py")}
