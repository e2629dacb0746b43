"""What is special to the aligned weight loss: its two formulas, masks, and lists of layers."""

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from sdp_kernels import BitMask, aligned_weight_loss, use_backend
from sdp_kernels.spec import DEFAULT_FLOORS


def layers(dtype: torch.dtype = torch.float64, device: torch.device | str = "cpu") -> tuple[list[Tensor], list[Tensor]]:
    references = [torch.randn(shape, dtype=dtype, device=device) for shape in ((4, 6), (3, 40))]
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


SHAPES = ((4, 6), (1, 1), (9, 600), (2, 1), (5, 64), (1, 1100), (7, 32), (13, 17))


def value_and_gradients(weights: list[Tensor], references: list[Tensor], **options: Any) -> list[Tensor]:
    weights = [weight.detach().requires_grad_() for weight in weights]
    loss = aligned_weight_loss(weights, references, **options)
    return [loss.detach(), *torch.autograd.grad(loss, weights)]


def assert_kernels_right(weights: list[Tensor], references: list[Tensor], **options: Any) -> None:
    """Value and gradients, each as the contract of all ops judges them: by what eager torch loses in this dtype."""
    with use_backend("triton"):
        got = value_and_gradients(weights, references, **options)
    with use_backend("reference"):
        eager = value_and_gradients(weights, references, **options)
        double = [each.double() for each in weights], [each.double() for each in references]
        truth = value_and_gradients(*double, **options)
    for one, plain, expected in zip(got, eager, truth, strict=True):
        assert one.dtype == plain.dtype
        assert one.shape == expected.shape
        allowed = 2 * (plain - expected).abs().max() + DEFAULT_FLOORS[weights[0].dtype] * expected.abs().max()
        assert (one - expected).abs().max() <= allowed


def many_layers(weight: torch.dtype, reference: torch.dtype) -> tuple[list[Tensor], list[Tensor]]:
    references = [torch.randn(shape).to(reference) for shape in SHAPES]
    weights = [(each.float() + 0.3 * torch.randn(each.shape)).to(weight) for each in references]
    return weights, references


def make_masks(form: str, weights: list[Tensor]) -> list[Any] | None:
    if form == "none":
        return None
    keep = [torch.rand(weight.shape, device=weight.device) < 0.5 for weight in weights]
    return [
        BitMask.from_bool(each) if form == "packed" or (form == "mixed" and index % 2) else each
        for index, each in enumerate(keep)
    ]


@pytest.mark.parametrize("kind", ["cosine", "frobenius"])
@pytest.mark.parametrize("masks", ["none", "bool", "packed", "mixed"])
@pytest.mark.parametrize(
    "dtypes",
    [(torch.float32, torch.float32), (torch.float32, torch.bfloat16), (torch.float16, torch.float32)],
    ids=["fp32", "fp32-bf16", "fp16-fp32"],
)
@pytest.mark.usefixtures("nan_filled_memory", "triton_backend")
def test_kernels_take_all_layers_at_once(
    kind: Any, masks: str, dtypes: tuple[torch.dtype, torch.dtype], device: torch.device
) -> None:
    weights, references = (list(each) for each in many_layers(*dtypes))
    keep = make_masks(masks, weights)
    if keep is not None:
        for weight, mask in zip(weights, keep, strict=True):
            weight[~(mask.to_bool() if isinstance(mask, BitMask) else mask)] = torch.nan
        keep = [mask.to(device) for mask in keep]
    assert_kernels_right(
        [each.to(device) for each in weights], [each.to(device) for each in references], kind=kind, masks=keep
    )


@pytest.mark.parametrize("kind", ["cosine", "frobenius"])
@pytest.mark.usefixtures("triton_backend")
def test_kernels_read_aligned_rows_and_views(kind: Any, device: torch.device) -> None:
    """All rows in multiples of 16, once in memory of their own and once as parts of wider rows."""
    references = [torch.randn(5, 48, device=device), torch.randn(3, 544, device=device)]
    weights = [each + 0.3 * torch.randn_like(each) for each in references]
    masks = [torch.rand(each.shape, device=device) < 0.5 for each in weights]
    assert_kernels_right(weights, references, kind=kind, masks=masks)
    views = [[each[1:, 16:-16] for each in tensors] for tensors in (weights, references, masks)]
    assert_kernels_right(views[0], views[1], kind=kind, masks=views[2])


@pytest.mark.usefixtures("triton_backend")
def test_kernels_sum_a_layer_of_many_programs(device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    from sdp_kernels.alignment import kernel

    monkeypatch.setattr(kernel, "BLOCK_PARTS", 4)
    references = [torch.randn(70, 3, device=device), torch.randn(2, 3, device=device)]
    assert_kernels_right([each + 0.3 * torch.randn_like(each) for each in references], references)


@pytest.mark.parametrize("kind", ["cosine", "frobenius"])
@pytest.mark.usefixtures("triton_backend")
def test_memory_used_again_is_read_with_its_new_shape(kind: Any, device: torch.device) -> None:
    """The same addresses come back with other shapes, then with the first ones."""
    weight, reference = torch.randn(2, 24, device=device)
    for shape in ((4, 6), (6, 4), (2, 12), (3, 5), (4, 6)):
        size = shape[0] * shape[1]
        pair = [weight[:size].view(shape)], [reference[:size].view(shape)]
        assert_kernels_right(*pair, kind=kind)
        assert_kernels_right(*pair, kind=kind, masks=[torch.rand(shape, device=device) < 0.5])


@pytest.mark.usefixtures("triton_backend")
def test_tables_are_kept_while_the_layers_stay_where_they_are(device: torch.device) -> None:
    from sdp_kernels.alignment import kernel

    kernel._layers.cache_clear()
    weights, references = layers(torch.float32, device)
    with use_backend("triton"):
        for _ in range(3):
            value_and_gradients(weights, references)
    assert kernel._layers.cache_info().misses == 1
    assert kernel._layers.cache_info().maxsize < 100


@pytest.mark.usefixtures("triton_backend")
def test_a_weight_may_occur_twice_and_need_no_gradient(device: torch.device) -> None:
    weights, references = layers(torch.float32, device)
    weights[0].requires_grad_()

    def gradients() -> tuple[Tensor, ...]:
        loss = aligned_weight_loss([*weights, weights[0]], [*references, references[0]])
        return torch.autograd.grad(3 * loss, weights[0])

    with use_backend("triton"):
        got = gradients()
    with use_backend("reference"):
        torch.testing.assert_close(got, gradients())


@pytest.mark.usefixtures("triton_backend")
def test_reasons_against_the_kernels(device: torch.device) -> None:
    weights, references = layers(torch.float32, device)
    other = [references[0].half(), references[1]]
    asking = [references[0].clone().requires_grad_(), references[1]]
    apart = [references[0].T.contiguous().T, references[1]]
    with use_backend("triton"):
        for changed, reason in (
            (other, r"references have several dtypes, \['torch.float16', 'torch.float32'\]"),
            (asking, "a reference asks for a gradient"),
            (apart, "references have rows whose entries lie apart"),
            ([each.double() for each in references], "dtype torch.float64 is none of"),
        ):
            with pytest.raises(NotImplementedError, match=reason):
                aligned_weight_loss(weights, changed)
        with pytest.raises(NotImplementedError, match="weights have several dtypes"):
            aligned_weight_loss(other, references)
        with torch.no_grad():
            aligned_weight_loss(weights, asking)


def test_gradcheck_of_references() -> None:
    weights, references = layers()
    masks = [torch.rand(each.shape) < 0.5 for each in weights]
    for kind in ("cosine", "frobenius"):
        assert torch.autograd.gradcheck(
            lambda *values, kind=kind: aligned_weight_loss(weights, values, kind=kind, masks=masks),
            [each.requires_grad_() for each in references],
        )


@pytest.mark.parametrize("masks", ["none", "bool", "packed"])
@pytest.mark.parametrize("cosine", [True, False])
@pytest.mark.usefixtures("triton_backend")
def test_operators_are_registered_rightly(masks: str, cosine: bool, device: torch.device) -> None:
    weights, references = layers(torch.float32, device)
    made = make_masks(masks, weights) or []
    keep = [mask.words if isinstance(mask, BitMask) else mask for mask in made]
    leaves = [weight.clone().requires_grad_() for weight in weights]
    torch.library.opcheck(torch.ops.sdp_kernels.aligned_weights, (leaves, references, keep, cosine, 1e-12))
    loss, saved = torch.ops.sdp_kernels.aligned_weights(weights, references, keep, cosine, 1e-12)
    arguments = (torch.ones_like(loss), weights, references, keep, saved, cosine)
    torch.library.opcheck(torch.ops.sdp_kernels.aligned_weights_backward, arguments)


@pytest.mark.parametrize("masks", ["none", "packed"])
@pytest.mark.usefixtures("triton_backend")
def test_kernels_compile_without_graph_breaks(masks: str, device: torch.device) -> None:
    weights, references = layers(torch.float32, device)
    keep = make_masks(masks, weights)
    compiled = torch.compile(aligned_weight_loss, fullgraph=True, backend="aot_eager")
    results = []
    with use_backend("triton"):
        for call in (compiled, aligned_weight_loss):
            leaves = [weight.clone().requires_grad_() for weight in weights]
            loss = call(leaves, references, masks=keep)
            results.append([loss.detach(), *torch.autograd.grad(loss, leaves)])
    torch.testing.assert_close(*results)


@pytest.mark.usefixtures("triton_backend")
def test_double_backward_raises(device: torch.device) -> None:
    weights, references = layers(torch.float32, device)
    weights[0].requires_grad_()
    with use_backend("triton"):
        loss = aligned_weight_loss(weights, references)
    (gradient,) = torch.autograd.grad(loss, weights[0], create_graph=True)
    with pytest.raises(RuntimeError, match="aligned_weights_backward"):
        gradient.sum().backward()
