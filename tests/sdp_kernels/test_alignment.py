"""What is special to the aligned weight loss: its two formulas, masks, and lists of layers."""

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from sdp_kernels import BitMask, aligned_weight_loss


def layers(dtype: torch.dtype = torch.float64) -> tuple[list[Tensor], list[Tensor]]:
    references = [torch.randn(4, 6, dtype=dtype), torch.randn(3, 40, dtype=dtype)]
    return [each + 0.3 * torch.randn_like(each) for each in references], references


def test_cosine_averages_rows_then_layers() -> None:
    weights, references = layers()
    expected = [(1 - F.cosine_similarity(w, v)).mean() for w, v in zip(weights, references, strict=True)]
    torch.testing.assert_close(aligned_weight_loss(weights, references), sum(expected) / 2)


def test_frobenius_is_relative_to_each_layer() -> None:
    weights, references = layers()
    expected = [(w - v).norm() ** 2 / v.norm() ** 2 for w, v in zip(weights, references, strict=True)]
    loss = aligned_weight_loss(weights, references, kind="frobenius")
    torch.testing.assert_close(loss, sum(expected) / 2)


@pytest.mark.parametrize("kind", ["cosine", "frobenius"])
def test_zero_at_the_reference(kind: Any) -> None:
    _, references = layers()
    assert aligned_weight_loss(references, references, kind=kind).abs() < 1e-11
    scaled = aligned_weight_loss([2 * each for each in references], references, kind=kind)
    assert (scaled < 1e-11) == (kind == "cosine")


@pytest.mark.parametrize("kind", ["cosine", "frobenius"])
@pytest.mark.parametrize("packed", [True, False])
def test_masks_stand_for_zeros(kind: Any, packed: bool) -> None:
    weights, references = layers()
    keep = [torch.rand(each.shape) < 0.5 for each in weights]
    masks = [BitMask.from_bool(each) if packed else each for each in keep]
    zeroed = [torch.where(mask, weight, 0) for mask, weight in zip(keep, weights, strict=True)]
    expected = aligned_weight_loss(zeroed, references, kind=kind)
    poisoned = [
        torch.where(mask, weight, torch.nan).requires_grad_() for mask, weight in zip(keep, weights, strict=True)
    ]
    loss = aligned_weight_loss(poisoned, references, kind=kind, masks=masks)
    torch.testing.assert_close(loss, expected)
    for mask, gradient in zip(keep, torch.autograd.grad(loss, poisoned), strict=True):
        assert gradient.isfinite().all()
        assert (gradient[~mask] == 0).all()


def test_empty_rows_have_cosine_zero() -> None:
    weight = torch.zeros(2, 3, requires_grad=True)
    loss = aligned_weight_loss([weight], [torch.ones(2, 3)])
    assert loss == 1
    assert torch.autograd.grad(loss, weight)[0].isfinite().all()


def test_autocast_and_low_precision_stay_in_float32() -> None:
    weights, references = layers(torch.bfloat16)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = aligned_weight_loss(weights, references)
    assert loss.dtype == torch.float32
    assert torch.equal(loss, aligned_weight_loss(weights, references))


def test_compiles_without_graph_breaks() -> None:
    weights, references = layers()
    masks = [BitMask.from_bool(torch.rand(each.shape) < 0.5) for each in weights]
    compiled = torch.compile(aligned_weight_loss, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(
        compiled(weights, references, masks=masks), aligned_weight_loss(weights, references, masks=masks)
    )


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"weights": [], "references": []}, ValueError, "weights must have at least one layer"),
        ({"references": [torch.ones(2, 3)]}, ValueError, "references must be as many as weights, 2, got 1"),
        ({"masks": [torch.ones(2, 3).bool()]}, ValueError, "masks must be as many as weights, 2, got 1"),
        ({"references": [torch.ones(2, 3), torch.ones(3, 2)]}, ValueError, r"references\[1\] .* got \(3, 2\)"),
        ({"masks": [torch.ones(2, 3)] * 2}, TypeError, r"masks\[0\] must be a bool tensor or a BitMask"),
        ({"kind": "l2"}, ValueError, "kind must be one of .* got 'l2'"),
        ({"eps": 0.0}, ValueError, "eps must be above 0, got 0.0"),
    ],
)
def test_bad_arguments(change: dict[str, Any], error: type[Exception], message: str) -> None:
    arguments: dict[str, Any] = {"weights": [torch.ones(2, 3)] * 2, "references": [torch.ones(2, 3)] * 2}
    with pytest.raises(error, match=message):
        aligned_weight_loss(**(arguments | change))
