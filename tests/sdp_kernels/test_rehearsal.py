"""The rehearsal on a pretended GPU finds the tests that a real one would fail, and passes right ones."""

import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor

from sdp_kernels import BitMask, block_sparse_linear, cross_correlation_loss, masked_linear, select_mask, use_backend
from sdp_kernels.registry import SPECS
from tests.sdp_kernels.rehearsal import DEVICE, Rehearsal

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
APART = "Expected all tensors to be on the same device"


@pytest.fixture
def rehearsal() -> Iterator[Rehearsal]:
    with Rehearsal() as rehearsal:
        yield rehearsal


def inputs(device: torch.device | str) -> tuple[Tensor, Tensor]:
    return torch.randn(6, 20, device=device).requires_grad_(), torch.randn(6, 20, device=device)


def test_kernels_on_tensors_of_the_host_are_found(rehearsal: Rehearsal) -> None:
    pytest.importorskip("triton")
    host, there = inputs("cpu"), inputs(DEVICE)
    with use_backend("triton"):
        with pytest.raises(NotImplementedError, match="a tensor is on cpu, not on the pretended GPU"):
            cross_correlation_loss(*host)
        with pytest.raises(ValueError, match="sample_weight must be on the device of student, cpu:0, got cpu"):
            cross_correlation_loss(*there, sample_weight=torch.ones(6))
        with pytest.raises(RuntimeError, match=APART):  # an operator of the package, called as none of its tests may
            torch.ops.sdp_kernels.masked_linear(
                there[1], there[1], torch.ones(6, 20).bool(), None, None, [], 0, 0, False, None, "triton"
            )


def test_a_launch_on_memory_of_the_host_is_found(rehearsal: Rehearsal) -> None:
    kernel = pytest.importorskip("sdp_kernels.masked_linear.kernel_zero")
    weight, mask = torch.randn(4, 40), torch.ones(4, 40).bool()
    with pytest.raises(ValueError, match="cannot be accessed from Triton"):
        kernel.masked_copy(weight, mask)
    assert torch.equal(kernel.masked_copy(weight.to(DEVICE), mask.to(DEVICE)).cpu(), weight)


@pytest.mark.parametrize("spec", SPECS.values(), ids=lambda spec: spec.name)
def test_right_calls_pass_and_give_their_results_there(spec: object, rehearsal: Rehearsal) -> None:
    pytest.importorskip("triton")
    arguments = spec.inputs(spec.shapes[0], torch.float32, DEVICE)
    leaves = [arguments[name].requires_grad_() for name in spec.grad_args]
    with use_backend("triton"):
        output = spec.op(**arguments, **next(iter(spec.variants.values())))
    if isinstance(output, BitMask):
        output = output.to_bool()
    assert output in rehearsal
    if leaves:
        output.sum().backward()
        assert all(leaf.grad in rehearsal for leaf in leaves)


def test_the_host_is_refused_what_lies_on_the_gpu(rehearsal: Rehearsal) -> None:
    rows = torch.randn(3, 4, device=DEVICE)
    with pytest.raises(TypeError, match="pretended GPU"):
        rows.numpy()
    with use_backend("cpu"), pytest.raises(NotImplementedError, match="a tensor is on the pretended GPU"):
        select_mask(rows, 0.5)
    assert rows.cpu().numpy().shape == (3, 4)


def test_what_lies_apart_is_not_computed_with(rehearsal: Rehearsal) -> None:
    host, there = torch.randn(4, 4), torch.randn(4, 4, device=DEVICE)
    for mix in (torch.add, torch.matmul, torch.equal, lambda a, b: torch.cat((a, b)), lambda a, b: b[a > 0]):
        with pytest.raises(RuntimeError, match=APART):
            mix(there, host)
    with pytest.raises(AssertionError, match="'device' do not match: cpu:0 != cpu"):
        torch.testing.assert_close(there, there.cpu())
    leaf = there.clone().requires_grad_()
    with pytest.raises(RuntimeError, match=APART):
        (leaf * there).backward(host)


def test_what_a_gpu_takes_from_the_host_may_stay_there(rehearsal: Rehearsal) -> None:
    host, there = torch.randn(4, 4), torch.randn(4, 4, device=DEVICE)
    number, indices, mask = torch.tensor(2.0), torch.tensor([0, 2]), host > 0
    for result in (there * number, torch.where(there > 0, there, 0.0), there[indices], there[mask], there.double()):
        assert result in rehearsal
    there[mask] = torch.nan
    host.copy_(there)
    assert host not in rehearsal
    assert torch.equal(host.isnan(), mask)


def test_views_and_copies_are_told_apart(rehearsal: Rehearsal) -> None:
    there = torch.tensor([[1.0, 2.0], [3.0, 4.0]], device=DEVICE)
    host = there.cpu()
    assert (there.device, host.device, there[0].detach().device) == (DEVICE, torch.device("cpu"), DEVICE)
    host.zero_()
    assert there.sum() == 10
    assert there.to(DEVICE) is there
    assert there.to(host) not in rehearsal
    assert host.to(there.device, torch.float16) in rehearsal
    assert all(make(there) in rehearsal for make in (torch.empty_like, torch.detach, torch.nn.Parameter))
    assert torch.ones(2) not in rehearsal


def test_recorders_see_no_mode_and_are_watched_all_the_same(rehearsal: Rehearsal) -> None:
    compiled = torch.compile(lambda a, b: (a * b).sum(), backend="aot_eager", fullgraph=True)
    there = torch.randn(3, device=DEVICE, requires_grad=True)
    with pytest.raises(RuntimeError, match=APART):
        compiled(there, torch.ones(3))
    result = compiled(there, torch.ones(3, device=DEVICE))
    result.backward()
    assert result in rehearsal
    assert there.grad in rehearsal


def test_memory_used_again_lies_where_it_is_now(rehearsal: Rehearsal) -> None:
    for _ in range(50):
        assert torch.empty(8, device=DEVICE) in rehearsal
        assert torch.empty(8) not in rehearsal


def test_nothing_is_left_behind() -> None:
    before = torch.Tensor.to, torch.Tensor.device, torch.tensor, torch.compile
    with Rehearsal():
        there = torch.ones(2, device=DEVICE)
    assert before == (torch.Tensor.to, torch.Tensor.device, torch.tensor, torch.compile)
    assert there.device == torch.device("cpu")
    assert torch.equal(there + torch.ones(2), torch.full((2,), 2.0))


def test_block_sparse_and_masked_products_refuse_a_matrix_left_behind(rehearsal: Rehearsal) -> None:
    arguments = SPECS["block_sparse_linear"].inputs((5, 32, 32, 16, 16), torch.float32, torch.device("cpu"))
    with pytest.raises(ValueError, match="weight must be on the device of input, cpu:0, got cpu"):
        block_sparse_linear(torch.randn(5, 32, device=DEVICE), arguments["pattern"])
    weight, mask = torch.randn(32, 32, device=DEVICE), BitMask.from_bool(torch.rand(32, 32) > 0.5)
    with pytest.raises(ValueError, match="mask must be on the device of"):
        masked_linear(torch.randn(5, 32, device=DEVICE), weight, mask)


PLANTED = """
import torch
from sdp_kernels import cross_correlation_loss, use_backend

def test_wrong(triton_backend):
    with use_backend(triton_backend):
        cross_correlation_loss(torch.randn(4, 9), torch.randn(4, 9))

def test_right(triton_backend, device):
    with use_backend(triton_backend):
        cross_correlation_loss(torch.randn(4, 9, device=device), torch.randn(4, 9).to(device))
"""


def test_each_test_that_forces_kernels_is_rehearsed(tmp_path: Path) -> None:
    """By the fixtures of this folder, for planted tests."""
    pytest.importorskip("triton")
    (tmp_path / "test_planted.py").write_text(PLANTED)
    options = ["-p", "tests.conftest", "-p", "tests.sdp_kernels.conftest", "-p", "no:cacheprovider", "-rA"]
    command = [sys.executable, "-m", "pytest", "--rootdir", str(tmp_path), "-c", os.devnull, *options, str(tmp_path)]
    root = Path(__file__).parents[2]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=root)
    assert re.search("^PASSED .*::test_right", done.stdout, re.MULTILINE), done.stdout + done.stderr
    assert re.search("^FAILED .*::test_wrong", done.stdout, re.MULTILINE), done.stdout
    assert "not on the pretended GPU" in done.stdout
