"""The helpers for CUDA devices, as far as they run without one."""

import warnings
from pathlib import Path

import pytest
import torch

from tests.cuda import Captured, no_waiting

HERE = Path(__file__).parent


def test_the_mode_that_finds_waiting_is_set_in_one_place() -> None:
    """Which takes its warning, an error in tests, for what it is."""
    name = "set_sync_" + "debug_mode"
    callers = {path.relative_to(HERE).as_posix() for path in HERE.rglob("*.py") if name in path.read_text("utf-8")}
    assert callers == {"cuda.py"}


def test_waiting_is_forbidden_only_within(monkeypatch: pytest.MonkeyPatch) -> None:
    modes: list[str] = []

    def set_mode(mode: str) -> None:
        warnings.warn("Synchronization debug mode is a prototype feature and does not yet detect all", stacklevel=2)
        modes.append(mode)

    monkeypatch.setattr(torch.cuda, "set_sync_" + "debug_mode", set_mode)
    with no_waiting():
        assert modes == ["error"]
    with pytest.raises(KeyError), no_waiting():
        raise KeyError
    assert modes == ["error", "default"] * 2


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_waiting_raises() -> None:
    number = torch.ones((), device="cuda")
    with no_waiting(), pytest.raises(RuntimeError, match="synchronizing CUDA operation"):
        number.item()
    assert number.item() == 1


def test_a_captured_call_is_repeated_on_new_contents() -> None:
    device = "cuda" if torch.cuda.is_available() else "cpu"
    numbers = torch.arange(3.0, device=device)
    captured = Captured(lambda: numbers * 2)
    numbers += 1
    assert captured.replay().tolist() == [2.0, 4.0, 6.0]
