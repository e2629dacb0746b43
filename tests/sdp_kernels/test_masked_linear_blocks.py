"""Products with blocks of a mask on a CPU: every size of block and batch, with the compiled engine and without."""

import pytest
import torch

from sdp_kernels import BitMask, masked_linear
from sdp_kernels.cpu_engine import availability
from sdp_kernels.masked_linear import cpu, mask_arguments, products


@pytest.fixture(params=["engine", "torch"], autouse=True)
def implementation(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    if request.param == "engine":
        request.getfixturevalue("numba")
    if request.param == "torch":
        monkeypatch.setattr(availability, "_numba_installed", lambda: False)
    return str(request.param)


def mask_of(keep: torch.Tensor, block_shape: tuple[int, int]) -> BitMask:
    return BitMask.from_blocks(keep, block_shape, (keep.shape[0] * block_shape[0], keep.shape[1] * block_shape[1]))


NARROW = [(16, 4), (32, 4), (32, 1), (17, 3), (80, 5)]
everything_walks = pytest.mark.usefixtures("walks_at_any_density")


@pytest.fixture
def walks_at_any_density(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpu, "MOST_DENSE", {True: 1.0, False: 1.0})


def assert_as_in_float64(mask: BitMask, tokens: int) -> None:
    """Output and all gradients, from an input and for a cotangent that are not contiguous."""
    input = torch.randn(mask.shape[1], tokens, requires_grad=True)
    weight, bias = torch.randn(mask.shape, requires_grad=True), torch.randn(mask.shape[0], requires_grad=True)
    cotangent = torch.randn(mask.shape[0], tokens).T
    leaves = input, weight, bias
    output = masked_linear(input.T, weight, mask, bias)
    exact = [leaf.detach().double().requires_grad_() for leaf in leaves]
    truth = torch.nn.functional.linear(exact[0].T, torch.where(mask.to_bool(), exact[1], 0), exact[2])
    results = output, *torch.autograd.grad(output, leaves, cotangent)
    wanted = truth, *torch.autograd.grad(truth, exact, cotangent.double())
    for got, want in zip(results, wanted, strict=True):
        torch.testing.assert_close(got.double(), want, rtol=1e-5, atol=1e-5 * max(mask.shape[0], tokens) ** 0.5)
    assert not results[2][~mask.to_bool()].any()


@pytest.mark.parametrize("block_shape", NARROW)
@pytest.mark.parametrize("tokens", [0, 1, 40, 300])
@pytest.mark.usefixtures("nan_filled_memory")
@everything_walks
def test_products_of_narrow_blocks(
    block_shape: tuple[int, int], tokens: int, implementation: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With an empty row and an empty column, and rows that keep more and fewer columns than a register tile holds."""
    walks: list[int] = []
    product = cpu.product
    monkeypatch.setattr(cpu, "product", lambda *args: walks.append(1) or product(*args))
    keep = torch.rand(3, 37) < torch.tensor([[0.6], [0.0], [0.05]])
    keep[:, 4], keep[2, 1] = False, True
    assert_as_in_float64(mask_of(keep, block_shape), tokens)
    assert len(walks) == (implementation == "engine")


@pytest.mark.parametrize("block_shape", NARROW)
@pytest.mark.parametrize("fill", [True, False])
@everything_walks
def test_narrow_blocks_all_or_none(block_shape: tuple[int, int], fill: bool) -> None:
    assert_as_in_float64(mask_of(torch.full((2, 19), fill), block_shape), 21)


@pytest.mark.parametrize("block_shape", [(32, 1), (16, 16), None])
def test_a_mask_changed_in_place_is_followed(block_shape: tuple[int, int] | None) -> None:
    """From nothing pruned to a few blocks kept, and back: nothing that was found out about a mask outlives it."""
    full = torch.ones(64, 48, dtype=torch.bool)
    sparse = torch.arange(3).repeat_interleave(16).expand(64, -1) == 1
    mask, *others = (BitMask.from_bool(keep, block_shape=block_shape) for keep in (full, sparse, full))
    assert_as_in_float64(mask, 5)
    for other in others:
        mask.copy_(other)
        assert_as_in_float64(mask, 5)


@pytest.mark.parametrize("block_shape", [(32, 1), (32, 32), None])
def test_a_full_mask_makes_no_copy(block_shape: tuple[int, int] | None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(products, "masked", None)
    monkeypatch.setattr(products, "mask_", None)
    assert_as_in_float64(BitMask.from_bool(torch.ones(64, 96, dtype=torch.bool), block_shape=block_shape), 9)


def test_kernels_get_no_narrow_blocks() -> None:
    found = mask_arguments(mask_of(torch.ones(2, 3, dtype=torch.bool), (32, 1)), "triton", torch.ones(1, 3))
    assert (found["lists"], found["block_rows"], found["block_columns"]) == ([], 0, 0)


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
