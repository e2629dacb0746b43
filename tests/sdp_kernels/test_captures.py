"""Nothing that a CUDA graph holds may be freed, and nothing that belongs to a graph may be kept for others.

Whether work is captured is only asked for here, so these tests need no GPU; test_gpu.py captures real graphs.
"""

import functools
import importlib

import pytest
import torch

from sdp_kernels import BitMask, select_mask, use_backend, zero_
from sdp_kernels.masks import bits


@pytest.fixture
def captured(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("mask_selection.op", "masks.bits"):
        monkeypatch.setattr(importlib.import_module(f"sdp_kernels.{name}"), "is_captured", lambda tensor: True)


def test_zeroing_keeps_what_a_graph_reads(
    device: torch.device, triton_backend: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    kernel_zero = importlib.import_module("sdp_kernels.masked_linear.kernel_zero")
    kept: list[tuple[torch.Tensor, torch.Tensor]] = []
    monkeypatch.setattr(kernel_zero, "_tables", {})
    monkeypatch.setattr(kernel_zero, "_read_by_graphs", kept)
    wide = torch.randn(9, 70, device=device)
    weights = [torch.randn(5, 70, device=device), wide[:, 3:60], torch.randn(6, 33, device=device).T]
    masks = [torch.rand(weight.shape, device=device) < 0.5 for weight in weights]
    others = [torch.randn(3, 40, device=device) for _ in range(kernel_zero.MOST_TABLES)]
    with use_backend(triton_backend):
        monkeypatch.setattr(kernel_zero, "is_captured", lambda tensor: True)
        with pytest.raises(RuntimeError, match="weights and masks that it was called with before"):
            zero_(weights, masks)
        monkeypatch.setattr(kernel_zero, "is_captured", lambda tensor: False)
        zero_(weights, masks)
        (table,) = kernel_zero._tables.values()
        assert not kept
        for weight in weights:
            weight.normal_()
        expected = [torch.where(mask, weight, 0) for weight, mask in zip(weights, masks, strict=True)]
        monkeypatch.setattr(kernel_zero, "is_captured", lambda tensor: True)
        zero_(weights, masks)
        for weight, want in zip(weights, expected, strict=True):
            assert torch.equal(weight, want)
        monkeypatch.setattr(kernel_zero, "is_captured", lambda tensor: False)
        for other in others:  # push the table out
            zero_(other, torch.ones_like(other).bool())
    assert len(kernel_zero._tables) == kernel_zero.MOST_TABLES
    assert all(found is not table for found in kernel_zero._tables.values())
    assert kept == [table], "the graph still reads it"


def test_patterns_first_made_inside_a_capture_are_not_kept(
    device: torch.device, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
) -> None:
    kept = functools.cache(bits._make_patterns)
    monkeypatch.setattr(bits, "_patterns", kept)
    mask = torch.rand(5, 70, device=device) < 0.5
    packed = BitMask.from_bool(mask)
    request.getfixturevalue("captured")
    assert torch.equal(packed.to_bool(), mask)
    assert kept.cache_info().currsize == 0, "what is made there holds nothing until the graph is replayed"


@pytest.mark.usefixtures("captured")
def test_mask_selection_refuses_before_it_waits(device: torch.device) -> None:
    with pytest.raises(RuntimeError, match=r"select_mask waits for its device.*no CUDA graph can hold it"):
        select_mask(torch.randn(4, 8, device=device), 0.5)
