"""Fixtures of the kernel tests."""

import importlib.util
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

TRITON_INSTALLED = importlib.util.find_spec("triton") is not None


@pytest.fixture
def device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


@pytest.fixture
def triton_backend() -> str:
    """The Triton kernels: on the GPU if there is one, otherwise in Triton's interpreter."""
    if not TRITON_INSTALLED:
        pytest.skip("triton is not installed")
    return "triton"


# The executor of Triton's intermediate code follows no addresses kept in memory (alignment) and no fake tensors
# (registration, compilation), and has no room for tests of memory beyond 2**31 entries.
BEYOND_EXECUTOR = ("alignment", "registered", "compile", "32_bits")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark the tests that run kernels for the executor, see tests/README.md; skip them without Triton."""
    for item in items:
        parameters = item.callspec.params.values() if hasattr(item, "callspec") else ()
        runs_kernels = "triton_backend" in getattr(item, "fixturenames", ()) or "triton" in map(str, parameters)
        if runs_kernels and not TRITON_INSTALLED:
            item.add_marker(pytest.mark.skip(reason="triton is not installed"))
        if runs_kernels and not any(word in item.nodeid for word in BEYOND_EXECUTOR):
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
