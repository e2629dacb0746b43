"""Fixtures of the kernel tests."""

import importlib.util
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from sdp_kernels.cpu_engine import availability
from tests.sdp_kernels.rehearsal import DEVICE, Rehearsal

TRITON_INSTALLED = importlib.util.find_spec("triton") is not None


@pytest.fixture(autouse=True)
def _rehearsal(request: pytest.FixtureRequest) -> Iterator[None]:
    """Let there be a pretended GPU for a test that would use a real one."""
    item = request.node
    if torch.cuda.is_available() or not runs_kernels(item):
        yield
        return
    with Rehearsal():
        yield


@pytest.fixture(autouse=True)
def _executor(monkeypatch: pytest.MonkeyPatch) -> None:
    """The executor's CUDA, which a torch without CUDA knows nothing of, captures no graphs."""
    if torch.cuda.is_available() and not torch.backends.cuda.is_built():
        monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)


@pytest.fixture
def device(request: pytest.FixtureRequest) -> torch.device:
    """The GPU, or the pretended one; a test whose kernels it forces must have its tensors there."""
    if torch.cuda.is_available():
        return torch.device("cuda")
    return DEVICE if runs_kernels(request.node) else torch.device("cpu")


@pytest.fixture
def triton_backend() -> str:
    """The Triton kernels: on the GPU if there is one, otherwise in Triton's interpreter."""
    if not TRITON_INSTALLED:
        pytest.skip("triton is not installed")
    return "triton"


@pytest.fixture
def numba() -> None:
    """The compiled engine of the CPU. A numba that refuses the NumPy beside it is none."""
    if not availability._finds_numba():
        pytest.skip("no numba that can be imported is installed")


# The executor of Triton's intermediate code follows no addresses kept in memory (alignment, zeroing) and no fake
# tensors (registration, compilation), has one thread and no room for memory beyond 2**31 entries, and is no device
# (test_gpu).
BEYOND_EXECUTOR = ("alignment", "zeroing", "registered", "compile", "several_threads", "32_bits", "test_gpu")


def runs_kernels(item: pytest.Item) -> bool:
    """Whether a test forces the backend "triton"."""
    parameters = item.callspec.params.values() if hasattr(item, "callspec") else ()
    return "triton_backend" in getattr(item, "fixturenames", ()) or "triton" in map(str, parameters)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark the tests that run kernels for the executor, see tests/README.md; skip them without Triton."""
    for item in items:
        forced = runs_kernels(item)
        if forced and not TRITON_INSTALLED:
            item.add_marker(pytest.mark.skip(reason="triton is not installed"))
        if forced and not any(word in item.nodeid for word in BEYOND_EXECUTOR):
            item.add_marker("executor")


@pytest.fixture
def nan_filled_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fresh memory holds NaN, so whatever is read before it is written shows."""

    def filled(make: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def wrapper(*args: Any, **kwargs: Any) -> Tensor:
            tensor = make(*args, **kwargs)
            return tensor.fill_(torch.nan) if tensor.is_floating_point() else tensor

        return wrapper

    monkeypatch.setattr(torch, "empty", filled(torch.empty))
    monkeypatch.setattr(torch, "empty_like", filled(torch.empty_like))
    monkeypatch.setattr(torch.Tensor, "new_empty", filled(torch.Tensor.new_empty))
