"""Mask selection: exact counts, ties, global ranking, every structure, every refusal."""

from typing import Any

import pytest
import torch
from torch import Tensor

from sdp_kernels import select_mask, use_backend
from sdp_kernels.mask_selection import packing, select_mask_reference
from sdp_kernels.mask_selection import threshold as threshold_module
from sdp_kernels.mask_selection.threshold import kth_smallest

SPARSITIES = [0.0, 0.1, 0.5, 0.9, 0.999]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("chunk", [7, 2**20])
def test_kth_smallest_is_that_of_sorting(dtype: torch.dtype, chunk: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(threshold_module, "CHUNK_ELEMENTS", chunk)
    special = torch.tensor([0.0, -0.0, torch.inf, -torch.inf, 1e-42, -1e-42, 6e4, 1.0, 1.0]).to(dtype)
    tensors = [torch.randn(5, 7).to(dtype), special, (torch.randn(11) * 1e-3).to(dtype)]
    ordered = torch.cat([tensor.flatten() for tensor in tensors]).sort().values
    for k in range(1, len(ordered) + 1):
        threshold, kept_ties = kth_smallest(tensors, k)
        assert threshold == ordered[k - 1].item()
        assert kept_ties == int((ordered[k:] == threshold).sum())


@pytest.mark.parametrize("sparsity", SPARSITIES)
def test_exact_count_and_the_best_are_kept(sparsity: float) -> None:
    scores = torch.randn(13, 77)
    keep = select_mask(scores, sparsity, allow_empty=True).to_bool()
    assert int((~keep).sum()) == round(sparsity * scores.numel())
    if sparsity > 0:
        assert scores[keep].min() > scores[~keep].max()
    assert torch.equal(keep, select_mask_reference(scores, sparsity))


def test_of_equal_scores_the_later_is_pruned() -> None:
    keep = select_mask(torch.ones(2, 4), 0.25).to_bool()
    assert keep.tolist() == [[True] * 4, [True, True, False, False]]
    first, second = select_mask([torch.zeros(1, 4), -torch.zeros(1, 4)], 0.75, scope="global", allow_empty=True)
    assert first.to_bool().tolist() == [[True, True, False, False]]
    assert not second.to_bool().any()


def test_halves_round_to_even() -> None:
    assert select_mask(torch.rand(1, 5), 0.5).to_bool().sum() == 3
    assert select_mask(torch.rand(1, 7), 0.5).to_bool().sum() == 3


@pytest.mark.parametrize("sparsity", SPARSITIES[1:])
def test_global_scope_ranks_all_together(sparsity: float) -> None:
    scores = [torch.randn(9, 11), 3 * torch.randn(4, 8), torch.randn(1, 6).round()]
    masks = select_mask(scores, sparsity, scope="global", allow_empty=True)
    joined = torch.cat([each.flatten() for each in scores])[None]
    keep = torch.cat([mask.to_bool().flatten() for mask in masks])
    assert torch.equal(keep, select_mask_reference(joined, sparsity)[0])


def test_tensor_scope_ranks_each_alone() -> None:
    scores = [torch.randn(9, 11), 100 + torch.randn(4, 8)]
    for mask, each in zip(select_mask(scores, 0.7), scores, strict=True):
        assert mask.equal(select_mask(each, 0.7))


@pytest.mark.parametrize("reduction", ["sum", "mean", "max"])
def test_blocks_are_kept_whole(reduction: Any) -> None:
    scores = torch.rand(12, 40)
    mask = select_mask(scores, 0.5, structure="block", block_shape=(4, 10), block_reduction=reduction)
    assert mask.block_shape == (4, 10)
    blocks = scores.view(3, 4, 4, 10).transpose(1, 2).flatten(2)
    strength = {"sum": blocks.sum(2), "mean": blocks.mean(2), "max": blocks.amax(2)}[reduction]
    assert torch.equal(mask.to_blocks(), select_mask_reference(strength, 0.5))
    assert mask.sparsity == 0.5


def test_rows_are_kept_whole() -> None:
    scores = torch.rand(10, 7)
    mask = select_mask(scores, 0.3, structure="row")
    assert mask.block_shape == (1, 7)
    kept = mask.to_bool().all(1)
    assert torch.equal(kept, mask.to_bool().any(1))
    assert scores.sum(1)[kept].min() > scores.sum(1)[~kept].max()


def test_n_of_m_keeps_the_best_of_every_group() -> None:
    scores = torch.randn(6, 24)
    keep = select_mask(scores, structure="n:m", n=2, m=4).to_bool().view(-1, 4)
    assert (keep.sum(1) == 2).all()
    groups = scores.view(-1, 4)
    assert (groups.masked_fill(~keep, torch.inf).amin(1) > groups.masked_fill(keep, -torch.inf).amax(1)).all()
    tied = select_mask(torch.ones(1, 4), structure="n:m", n=1, m=4).to_bool()
    assert tied.tolist() == [[True, False, False, False]]


def test_infinite_scores() -> None:
    scores = torch.tensor([[1.0, -torch.inf, torch.inf, -5.0, -torch.inf]])
    assert select_mask(scores, 0.4).to_bool().tolist() == [[True, False, True, True, False]]
    assert select_mask(scores, 0.2).to_bool().tolist() == [[True, True, True, True, False]]


def test_strided_and_tracked_scores() -> None:
    scores = torch.randn(8, 12, requires_grad=True)
    mask = select_mask(scores.T, 0.5)
    assert mask.equal(select_mask(scores.detach().T.contiguous(), 0.5))
    blocks = select_mask(scores.T, 0.5, structure="block", block_shape=(3, 4))
    assert blocks.equal(select_mask(scores.detach().T.contiguous(), 0.5, structure="block", block_shape=(3, 4)))


def test_an_emptied_tensor_is_refused_unless_allowed() -> None:
    scores = [torch.rand(4, 4) + 1, torch.rand(2, 2)]
    with pytest.raises(ValueError, match=r"scores\[1\] would lose all its 4 units at sparsity 0.5"):
        select_mask(scores, 0.5, scope="global")
    assert select_mask(scores, 0.5, scope="global", allow_empty=True)[1].sparsity == 1
    with pytest.raises(ValueError, match=r"scores\[0\] would lose all its 1 units"):
        select_mask(torch.rand(1, 1), 0.9)


@pytest.mark.parametrize(
    ("scores", "options", "error", "message"),
    [
        (torch.ones(4, 4), {"sparsity": 1.0}, ValueError, r"sparsity must be in \[0, 1\), got 1.0"),
        (torch.ones(4, 4), {"sparsity": -0.1}, ValueError, "sparsity .* got -0.1"),
        (torch.ones(4, 4), {}, ValueError, "sparsity .* got None"),
        (torch.ones(4, 4), {"sparsity": "0.5"}, ValueError, r"sparsity must be in \[0, 1\), got '0.5'"),
        (torch.ones(4, 4), {"structure": "n:m", "n": 2.0, "m": 4}, ValueError, "whole numbers .* got n=2.0, m=4"),
        (
            torch.ones(4, 4),
            {"sparsity": 0.5, "structure": "block", "block_shape": 2},
            ValueError,
            r"scores\[0\]: block_shape must be two whole numbers of at least 1, got 2",
        ),
        (torch.ones(4), {"sparsity": 0.5}, ValueError, r"scores\[0\] must be a matrix .* got shape \(4,\)"),
        (torch.ones(4, 0), {"sparsity": 0.5}, ValueError, r"scores\[0\] .* got shape \(4, 0\)"),
        (torch.ones(4, 4).int(), {"sparsity": 0.5}, TypeError, r"scores\[0\] .* torch.int32"),
        ([torch.ones(2, 2), torch.full((2, 2), torch.nan)], {"sparsity": 0.5}, ValueError, r"scores\[1\].* NaN"),
        (torch.ones(4, 4), {"sparsity": 0.5, "structure": "head"}, ValueError, "structure .* got 'head'"),
        (torch.ones(4, 4), {"sparsity": 0.5, "scope": "layer"}, ValueError, "scope .* got 'layer'"),
        (torch.ones(4, 4), {"sparsity": 0.5, "block_reduction": "l2"}, ValueError, "block_reduction .* got 'l2'"),
        (torch.ones(4, 4), {"sparsity": 0.5, "structure": "block"}, ValueError, "block_shape .* got None"),
        (torch.ones(4, 4), {"sparsity": 0.5, "block_shape": (2, 2)}, ValueError, "block_shape .* 'unstructured'"),
        (
            [torch.ones(4, 4), torch.ones(4, 6)],
            {"sparsity": 0.5, "structure": "block", "block_shape": (2, 4)},
            ValueError,
            r"scores\[1\]: block_shape \(2, 4\) must divide the shape \(4, 6\)",
        ),
        (
            torch.tensor([[torch.inf, -torch.inf]]),
            {"sparsity": 0.5, "structure": "block", "block_shape": (1, 2)},
            ValueError,
            r"scores\[0\] holds \+inf and -inf in one block",
        ),
        (torch.ones(4, 4), {"sparsity": 0.5, "n": 2, "m": 4}, ValueError, "n and m are for structure 'n:m'"),
        (torch.ones(4, 4), {"structure": "n:m", "n": 5, "m": 4}, ValueError, "0 < n <= m, got n=5, m=4"),
        (torch.ones(4, 6), {"structure": "n:m", "n": 2, "m": 4}, ValueError, r"m=4 must divide .* \(4, 6\)"),
        (
            torch.ones(4, 4),
            {"structure": "n:m", "n": 2, "m": 4, "sparsity": 0.5},
            ValueError,
            "n:m takes no sparsity",
        ),
    ],
)
def test_bad_arguments(
    scores: Tensor | list[Tensor], options: dict[str, Any], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        select_mask(scores, **options)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("scope", ["tensor", "global"])
def test_kernels_rank_many_tensors(dtype: torch.dtype, scope: Any, device: torch.device, triton_backend: str) -> None:
    """Several programs a tensor, ties of both zeros and across programs, a tensor of one row, every rank."""
    tied = torch.randn(70, 65).round()
    special = torch.tensor([[0.0, -0.0, torch.inf, -torch.inf, 6e-8, -6e-8, 6e4, 1.0, 1.0]])
    near = 1 + torch.randperm(4000).view(50, 80) * 2**-23  # differ in the last digit only
    scores = [each.to(device, dtype) for each in (torch.randn(9, 130), tied, -tied.T, special, near)]
    for sparsity in (0.0, 0.1, 0.45, 0.9, 0.999):
        expected = select_mask([each.cpu() for each in scores], sparsity, scope=scope, allow_empty=True)
        with use_backend(triton_backend):
            got = select_mask(scores, sparsity, scope=scope, allow_empty=True)
        for mask, want in zip(got, expected, strict=True):
            assert mask.to("cpu").equal(want)


def _misleading_scores(order: str) -> Tensor:
    """(40, 300) scores whose every 127th tells little or nothing about the rest."""
    scores = torch.randn(12000).sort().values
    if order == "descending":
        scores = scores.flip(0)
    elif order == "constant":
        scores = torch.full((12000,), -2.5)
    elif order == "the sample is the highest":
        scores[::127] = 1e30
    elif order == "the sample is the lowest":
        scores[::127] = -torch.inf
    elif order == "the sample is constant":
        scores[::127] = 0.0
    elif order == "a gap":
        scores = torch.where(torch.rand(12000) < 0.5, 0.0, torch.rand(12000) + 1)
    return scores.view(40, 300)


@pytest.mark.parametrize(
    "order",
    [
        "ascending",
        "descending",
        "constant",
        "the sample is the highest",
        "the sample is the lowest",
        "the sample is constant",
        "a gap",
    ],
)
def test_kernels_verify_what_a_sample_guesses(order: str, device: torch.device, triton_backend: str) -> None:
    scores = _misleading_scores(order)
    for sparsity in (0.3, 0.9):
        expected = select_mask(scores, sparsity)
        with use_backend(triton_backend):
            assert select_mask(scores.to(device), sparsity).to("cpu").equal(expected)


@pytest.mark.parametrize("guess", [-torch.inf, 1.0, torch.inf, None])
def test_kernels_need_no_second_count_if_the_guess_is_right(
    guess: float | None, device: torch.device, triton_backend: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without the count of the second digit, right masks only come from counts around the guess, and only then."""
    from sdp_kernels.mask_selection import kernel

    class WithoutSecondCount:
        def __getitem__(self, grid: Any) -> Any:
            launch = count[grid]
            return lambda *args, DIGIT, **options: DIGIT == 1 or launch(*args, DIGIT=DIGIT, **options)

    count = kernel._count_kernel
    scores = [torch.rand(60, 300) + 1, torch.rand(20, 300) + 1]
    expected = select_mask(scores, 0.7, scope="global")
    if guess is not None:
        monkeypatch.setattr(kernel, "_guess", lambda units, _: torch.tensor(guess, device=units[0].device))
    with use_backend(triton_backend):
        exact = select_mask([each.to(device) for each in scores], 0.7, scope="global")
        monkeypatch.setattr(kernel, "_count_kernel", WithoutSecondCount())
        halved = select_mask([each.to(device) for each in scores], 0.7, scope="global", allow_empty=True)
    assert all(mask.to("cpu").equal(want) for mask, want in zip(exact, expected, strict=True))
    assert all(mask.to("cpu").equal(want) for mask, want in zip(halved, expected, strict=True)) == (guess is None)


@pytest.mark.parametrize(("n", "m", "columns"), [(2, 4, 36), (1, 3, 99), (7, 16, 64), (5, 5, 5)])
def test_kernels_keep_n_of_m(n: int, m: int, columns: int, device: torch.device, triton_backend: str) -> None:
    scores = torch.randn(7, columns).mul(2).round().to(device)
    with use_backend(triton_backend):
        mask = select_mask(scores, structure="n:m", n=n, m=m)
    assert torch.equal(mask.to_bool().cpu(), select_mask_reference(scores.cpu(), structure="n:m", n=n, m=m))


def test_kernels_refuse_what_cannot_be_ranked(device: torch.device, triton_backend: str) -> None:
    scores = [torch.ones(3, 40, device=device) for _ in range(2)]
    with use_backend(triton_backend):
        with pytest.raises(ValueError, match=r"scores\[1\] would lose all its 120 units"):
            select_mask(scores, 0.5, scope="global")
        scores[1][2, 33] = torch.nan
        with pytest.raises(ValueError, match=r"scores\[1\] of shape \(3, 40\) holds NaN"):
            select_mask(scores, 0.5)
        with pytest.raises(NotImplementedError, match=r"dtype torch\.float64"):
            select_mask(scores[0].double(), 0.5)


@pytest.mark.parametrize("options", [{"sparsity": 0.7}, {"structure": "n:m", "n": 2, "m": 4}])
def test_memory_is_that_of_a_chunk(options: dict[str, Any]) -> None:
    """16 MiB of scores; one bool tensor of their size would be 4 MiB."""
    scores = torch.randn(1024, 4096)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(packing, "CHUNK_ELEMENTS", 2**14)
        patch.setattr(threshold_module, "CHUNK_ELEMENTS", 2**14)
        mask, peak = select_mask(scores, **options), 0
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
            select_mask(scores, **options)
    held = 0
    for event in profile.profiler.kineto_results.events():
        if event.name() == "[memory]":
            held += event.nbytes()
            peak = max(peak, held)
    assert mask.nbytes <= peak < scores.numel()


def test_nothing_to_select_from() -> None:
    assert select_mask([], 0.5, scope="global") == []
