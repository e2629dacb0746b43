"""Products with blocks of a mask on a CPU: every size of block and batch, with the compiled engine and without."""

import pytest
import torch

from sdp_kernels import BitMask, masked_linear
from sdp_kernels.cpu_engine import availability
from sdp_kernels.masked_linear import cpu


@pytest.fixture(params=["engine", "torch"], autouse=True)
def implementation(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    if request.param == "engine":
        request.getfixturevalue("numba")
    if request.param == "torch":
        monkeypatch.setattr(availability, "_numba_installed", lambda: False)
    return str(request.param)


def mask_of(keep: torch.Tensor, block_shape: tuple[int, int]) -> BitMask:
    return BitMask.from_blocks(keep, block_shape, (keep.shape[0] * block_shape[0], keep.shape[1] * block_shape[1]))


@pytest.mark.parametrize("block_shape", [(16, 16), (32, 32), (17, 20), (16, 48), (61, 33), (128, 32)])
@pytest.mark.parametrize("tokens", [0, 1, 40, 700])
@pytest.mark.usefixtures("nan_filled_memory")
def test_gradient_of_the_weight(block_shape: tuple[int, int], tokens: int) -> None:
    """Kept blocks hold the dense gradient, pruned ones zeros; an empty row and an empty column."""
    keep = torch.tensor([[True, False, True], [False, False, False], [True, False, False], [True, False, True]])
    gradient = torch.randn(tokens, 4 * block_shape[0])
    input = torch.randn(tokens, 3 * block_shape[1])
    weight = torch.full((gradient.shape[1], input.shape[1]), torch.nan)
    got = cpu.weight_gradient(gradient, input, weight, mask_of(keep, block_shape))
    mask = keep.repeat_interleave(block_shape[0], 0).repeat_interleave(block_shape[1], 1)
    expected = torch.where(mask, gradient.double().T @ input.double(), 0)
    assert got.dtype == torch.float32
    assert not got[~mask].any()
    torch.testing.assert_close(got.double(), expected, rtol=1e-5, atol=1e-5 * max(1, tokens) ** 0.5)


@pytest.mark.parametrize("fill", [True, False])
def test_full_and_empty_masks(fill: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpu, "MOST_DENSE", {True: 1.0, False: 1.0})
    mask = BitMask.from_blocks(torch.full((3, 2), fill), (16, 32), (48, 64))
    input, weight = torch.randn(2, 5, 64, requires_grad=True), torch.randn(48, 64, requires_grad=True)
    output = masked_linear(input, weight, mask)
    expected = torch.nn.functional.linear(input, weight * fill)
    torch.testing.assert_close(output, expected, rtol=1e-5, atol=1e-5)
    cotangent = torch.randn_like(output).transpose(0, 1).contiguous().transpose(0, 1)
    gradients = torch.autograd.grad(output, (input, weight), cotangent)
    for got, want in zip(gradients, torch.autograd.grad(expected, (input, weight), cotangent), strict=True):
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)


def test_runs_on_several_threads_and_leaves_their_number_alone(implementation: str) -> None:
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        gradient, input, weight = torch.randn(90, 80), torch.randn(90, 64), torch.randn(80, 64)
        mask = mask_of(torch.rand(5, 4) < 0.5, (16, 16))
        several = cpu.weight_gradient(gradient, input, weight, mask)
        assert torch.get_num_threads() == 2
        torch.set_num_threads(1)
        assert torch.equal(cpu.weight_gradient(gradient, input, weight, mask), several), implementation
    finally:
        torch.set_num_threads(threads)
