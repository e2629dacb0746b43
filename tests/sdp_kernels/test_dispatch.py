"""Backends: what is chosen, what is refused and why, and life without Triton."""

import subprocess
import sys
import threading

import pytest
import torch
from torch import Tensor

import sdp_kernels
from sdp_kernels import cross_correlation_loss, use_backend
from sdp_kernels.dispatch import choose_backend, reasons_against

ALL = ("triton", "cpu", "reference")


def test_public_names() -> None:
    assert sdp_kernels.__all__ == sorted(sdp_kernels.__all__, key=lambda name: (name.islower(), name))
    for name in sdp_kernels.__all__:
        assert getattr(sdp_kernels, name).__doc__


def test_cpu_tensors_run_on_the_cpu_backend_by_default() -> None:
    tensor = torch.ones(2)
    assert choose_backend("op", [tensor], ALL) == "cpu"
    assert choose_backend("op", [tensor], ("reference",)) == "reference"
    assert choose_backend("op", [tensor.to("meta")], ALL) == "reference"


def test_a_forced_backend_is_taken_and_given_back() -> None:
    tensor = torch.ones(2)
    with use_backend("reference"):
        assert choose_backend("op", [tensor], ALL) == "reference"
        with use_backend("cpu"):
            assert choose_backend("op", [tensor], ALL) == "cpu"
            assert choose_backend("op", [tensor], ("reference",)) == "reference"
        assert choose_backend("op", [tensor], ALL) == "reference"
    with pytest.raises(KeyError), use_backend("reference"):
        raise KeyError
    assert choose_backend("op", [tensor], ALL) == "cpu"


def test_a_forced_backend_stays_in_its_thread() -> None:
    seen = []
    with use_backend("reference"):
        thread = threading.Thread(target=lambda: seen.append(choose_backend("op", [torch.ones(2)], ALL)))
        thread.start()
        thread.join()
    assert seen == ["cpu"]


def test_tangents_are_not_dropped() -> None:
    weight = torch.ones(2, 3)
    ops = [
        lambda rows: sdp_kernels.masked_linear(rows, weight, weight > 0),
        lambda rows: sdp_kernels.block_sparse_linear(rows, sdp_kernels.BlockSparseMatrix.from_dense(weight, (2, 3))),
        lambda rows: cross_correlation_loss(rows, torch.randn(4, 3)),
    ]
    for op in ops:
        with pytest.raises(NotImplementedError, match=r"_l.* has no forward-mode derivative"):
            torch.func.jvp(op, (torch.randn(4, 3),), (torch.ones(4, 3),))
        with torch.autograd.forward_ad.dual_level():
            dual = torch.autograd.forward_ad.make_dual(torch.randn(4, 3), torch.ones(4, 3))
            with pytest.raises(NotImplementedError, match=r"_l.* has no forward-mode derivative"):
                op(dual)


def test_unknown_backend() -> None:
    with pytest.raises(ValueError, match=r"name must be one of .* got 'cuda'"), use_backend("cuda"):
        pass


def test_refusals_list_every_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    monkeypatch.setattr("sdp_kernels.dispatch._triton_installed", lambda: False)
    student = torch.randn(4, 3, dtype=torch.float64)
    with pytest.raises(NotImplementedError) as refusal, use_backend("triton"):
        cross_correlation_loss(student, student)
    message = str(refusal.value)
    assert "cross_correlation_loss cannot run on backend 'triton'" in message
    for reason in ("triton is not installed", "dtype torch.float64", "a tensor is on cpu"):
        assert message.count(reason) == 1
    assert reasons_against("cpu", [student.to("meta")], ALL) == ["a tensor is on meta"]


def double(input: Tensor) -> Tensor:
    """An op without a kernel."""
    choose_backend("double", [input], ("reference",))
    return 2 * input


def test_an_op_without_a_kernel_says_so() -> None:
    refusal = pytest.raises(NotImplementedError, match=r"double .* has no Triton kernel")
    with refusal, use_backend("triton"):
        double(torch.randn(2, 3))


@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="no second CUDA device")
def test_kernels_run_where_their_tensors_are() -> None:
    student = torch.randn(8, 40, device="cuda:1", requires_grad=True)
    loss = cross_correlation_loss(student, torch.randn_like(student))
    loss.backward()
    assert loss.device.index == 1
    assert student.grad.isfinite().all()


def test_compiled_code_notices_a_change_of_backend() -> None:
    compiled = torch.compile(double, fullgraph=True, backend="aot_eager")
    compiled(torch.randn(2, 4))
    with pytest.raises(Exception, match="has no Triton kernel"), use_backend("triton"):
        compiled(torch.randn(2, 4))


WITHOUT_TRITON = """
import sys
for name in ("triton", "transformers", "numpy", "sdprune"):
    sys.modules[name] = None
import torch, sdp_kernels
student = torch.randn(4, 9, requires_grad=True)
sdp_kernels.cross_correlation_loss(student, torch.randn(4, 9)).backward()
mask = sdp_kernels.select_mask(torch.randn(6, 9), 0.5)
sdp_kernels.masked_linear(student, torch.randn(6, 9), mask).sum().backward()
try:
    with sdp_kernels.use_backend("triton"):
        sdp_kernels.cross_correlation_loss(student, torch.randn(4, 9))
except NotImplementedError as error:
    assert "triton is not installed" in str(error), error
else:
    raise AssertionError("a forced backend that is missing must raise")
"""

ONLY_TORCH = """
import sys, torch
before = {name.partition(".")[0] for name in sys.modules}
import sdp_kernels
after = {name.partition(".")[0] for name in sys.modules} - before
assert after <= {"sdp_kernels"} | set(sys.stdlib_module_names), after
"""


@pytest.mark.parametrize("code", [WITHOUT_TRITON, ONLY_TORCH], ids=["without_triton", "only_torch"])
def test_in_a_fresh_process(code: str) -> None:
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
