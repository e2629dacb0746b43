"""What is special to the KL and cosine losses: torch's own functions, masked classes, left-out rows."""

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from sdp_kernels import cosine_distance_loss, kl_divergence_loss, use_backend
from sdp_kernels.distillation import cpu

LOSSES = [kl_divergence_loss, cosine_distance_loss]


@pytest.mark.parametrize("temperature", [1.0, 2.5])
def test_kl_is_that_of_torch(temperature: float) -> None:
    student, teacher = torch.randn(2, 4, 5, 7, dtype=torch.float64)
    loss = kl_divergence_loss(student, teacher, temperature=temperature)
    expected = F.kl_div(
        torch.log_softmax(student / temperature, -1).flatten(0, 1),
        torch.softmax(teacher / temperature, -1).flatten(0, 1),
        reduction="batchmean",
    )
    torch.testing.assert_close(loss, expected * temperature**2)


def test_kl_gradient_is_the_difference_of_probabilities() -> None:
    student, teacher = torch.randn(2, 4, 7, dtype=torch.float64)
    student.requires_grad_()
    (gradient,) = torch.autograd.grad(kl_divergence_loss(student, teacher, temperature=3.0), student)
    expected = 3 * (torch.softmax(student / 3, -1) - torch.softmax(teacher / 3, -1)) / 4
    torch.testing.assert_close(gradient, expected)


def test_cosine_is_that_of_torch() -> None:
    student, teacher = torch.randn(2, 4, 5, 7, dtype=torch.float64)
    expected = (1 - F.cosine_similarity(student, teacher, dim=-1)).mean()
    torch.testing.assert_close(cosine_distance_loss(student, teacher), expected)
    torch.testing.assert_close(cosine_distance_loss(student, -student), torch.tensor(2.0, dtype=torch.float64))


def test_masked_classes_change_nothing() -> None:
    student, teacher = torch.randn(2, 4, 7)
    expected = kl_divergence_loss(student, teacher)
    closed = torch.full((4, 2), -torch.inf)
    student = torch.cat((student, closed), -1).requires_grad_()
    teacher = torch.cat((teacher, closed), -1).requires_grad_()
    loss = kl_divergence_loss(student, teacher)
    torch.testing.assert_close(loss, expected)
    for gradient in torch.autograd.grad(loss, (student, teacher)):
        assert gradient.isfinite().all()
        assert (gradient[:, 7:] == 0).all()


def test_extreme_logits_stay_finite() -> None:
    student = torch.tensor([[1e4, -1e4, 0.0]], requires_grad=True)
    teacher = torch.tensor([[-1e4, 1e4, 0.0]])
    loss = kl_divergence_loss(student, teacher)
    torch.testing.assert_close(loss, torch.tensor(2e4))
    assert torch.autograd.grad(loss, student)[0].isfinite().all()


@pytest.mark.parametrize("loss_function", LOSSES)
def test_weights_average_rows_and_leave_rows_out(loss_function: Callable[..., Tensor]) -> None:
    student, teacher = torch.randn(2, 2, 3, 5)
    weight = torch.tensor([[1.0, 0.0, 2.0], [0.0, 3.0, 1.0]])
    repeats = weight.flatten().long()
    expected = loss_function(
        student.view(6, 5).repeat_interleave(repeats, 0), teacher.view(6, 5).repeat_interleave(repeats, 0)
    )
    student[0, 1], teacher[1, 0] = torch.nan, torch.inf
    student.requires_grad_()
    loss = loss_function(student, teacher, sample_weight=weight)
    torch.testing.assert_close(loss, expected)
    (gradient,) = torch.autograd.grad(loss, student)
    assert gradient.isfinite().all()
    assert (gradient[0, 1] == 0).all()


@pytest.mark.parametrize("loss_function", LOSSES)
def test_weights_may_be_a_bool_mask(loss_function: Callable[..., Tensor]) -> None:
    student, teacher = torch.randn(2, 4, 5)
    mask = torch.tensor([True, False, True, True])
    expected = loss_function(student[mask], teacher[mask])
    torch.testing.assert_close(loss_function(student, teacher, sample_weight=mask), expected)


@pytest.mark.parametrize("loss_function", LOSSES)
@pytest.mark.parametrize("shape", [(2, 5), (300, 2000)])
def test_takes_a_teacher_from_inference_mode(loss_function: Callable[..., Tensor], shape: tuple[int, int]) -> None:
    student = torch.randn(shape, requires_grad=True)
    with torch.inference_mode():
        teacher = torch.randn(shape)
    loss_function(student, teacher).backward()
    assert student.grad is not None


@pytest.mark.parametrize("loss_function", LOSSES)
@pytest.mark.parametrize(("weight", "got"), [(0.0, "0 of 3"), (-1.0, "-1.0"), (torch.nan, "nan")])
def test_weights_that_cannot_count(loss_function: Callable[..., Tensor], weight: float, got: str) -> None:
    rows = torch.ones(3, 5)
    with pytest.raises(ValueError, match=f"sample_weight must be .* got {got}"):
        loss_function(rows, rows, sample_weight=torch.full((3,), weight))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("loss_function", LOSSES)
def test_no_rows_kept_give_zero(loss_function: Callable[..., Tensor], device: torch.device) -> None:
    student, teacher = torch.full((2, 3, 5), torch.nan, device=device)
    student.requires_grad_()
    loss = loss_function(student, teacher, sample_weight=torch.zeros(3, device=device))
    assert loss == 0
    assert (torch.autograd.grad(loss, student)[0] == 0).all()


def test_rows_of_zeros_have_cosine_zero() -> None:
    student = torch.zeros(2, 3, requires_grad=True)
    loss = cosine_distance_loss(student, torch.ones(2, 3))
    assert loss == 1
    assert torch.autograd.grad(loss, student)[0].isfinite().all()


@pytest.mark.parametrize("loss_function", LOSSES)
def test_compiles_without_graph_breaks(loss_function: Callable[..., Tensor]) -> None:
    student, teacher = torch.randn(2, 4, 7)
    compiled = torch.compile(loss_function, fullgraph=True, backend="aot_eager")
    weight = torch.rand(4)
    torch.testing.assert_close(
        compiled(student.requires_grad_(), teacher, sample_weight=weight),
        loss_function(student, teacher, sample_weight=weight),
    )


@pytest.mark.parametrize(
    ("loss_function", "student", "teacher", "options", "error", "message"),
    [
        (kl_divergence_loss, torch.ones(2, 3), torch.ones(3, 2), {}, ValueError, r"teacher_logits .* got \(3, 2\)"),
        (kl_divergence_loss, torch.ones(2, 3), torch.ones(2, 3), {"temperature": 0}, ValueError, "temperature .* 0"),
        (kl_divergence_loss, torch.ones(()), torch.ones(()), {}, ValueError, "student_logits .* at least one row"),
        (kl_divergence_loss, torch.ones(0, 3), torch.ones(0, 3), {}, ValueError, r"got shape \(0, 3\)"),
        (cosine_distance_loss, torch.ones(2, 3).int(), torch.ones(2, 3), {}, TypeError, "student .* torch.int32"),
        (cosine_distance_loss, torch.ones(2, 3), torch.ones(2, 3), {"eps": -1.0}, ValueError, "eps .* got -1.0"),
        (
            cosine_distance_loss,
            torch.ones(2, 3),
            torch.ones(2, 3),
            {"sample_weight": torch.ones(2, 3)},
            ValueError,
            r"sample_weight must have shape \(2,\), got \(2, 3\)",
        ),
    ],
)
def test_bad_arguments(
    loss_function: Callable[..., Tensor],
    student: Tensor,
    teacher: Tensor,
    options: dict[str, Any],
    error: type[Exception],
    message: str,
) -> None:
    with pytest.raises(error, match=message):
        loss_function(student, teacher, **options)


def value_and_gradients(loss_function: Callable[..., Tensor], student: Tensor, teacher: Tensor, **options: Any) -> Any:
    student, teacher = student.detach().requires_grad_(), teacher.detach().requires_grad_()
    loss = loss_function(student, teacher, **options)
    return loss.detach(), *torch.autograd.grad(loss, (student, teacher))


def assert_right(loss_function: Callable[..., Tensor], student: Tensor, teacher: Tensor, **options: Any) -> None:
    """Value and both gradients on the backend in force, against the reference in float64."""
    got = value_and_gradients(loss_function, student, teacher, **options)
    with use_backend("reference"):
        truth = value_and_gradients(loss_function, student.double(), teacher.double(), **options)
    for name, one, expected in zip(("loss", "student", "teacher"), got, truth, strict=True):
        tolerance = 4 * torch.finfo(one.dtype).eps
        scale = expected.nan_to_num(0).abs().max().item()
        torch.testing.assert_close(
            one.double(), expected, rtol=tolerance, atol=tolerance * (1 + scale), equal_nan=True, msg=name
        )


@pytest.fixture(params=["triton", "cpu"])
def fused(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """Each fused implementation in force; that of the CPU in chunks of few rows."""
    if request.param == "triton":
        request.getfixturevalue("triton_backend")
    monkeypatch.setattr(cpu, "CHUNK_ELEMENTS", 12)
    with use_backend(request.param):
        yield request.param


@pytest.fixture
def place(fused: str, device: torch.device) -> torch.device:
    """Where tensors must lie for `fused`."""
    return device if fused == "triton" else torch.device("cpu")


@pytest.mark.parametrize("loss_function", LOSSES)
@pytest.mark.parametrize(
    "shape", [(5,), (1, 1), (4, 1), (70, 3), (3, 40), (2, 3, 7), (2, 2, 3, 17), (2, 1030), (2, 9000)]
)
@pytest.mark.parametrize("dtypes", [(torch.float32, torch.float32), (torch.float16, torch.float32)])
def test_fused_values_and_gradients(
    loss_function: Callable[..., Tensor],
    shape: tuple[int, ...],
    dtypes: tuple[torch.dtype, torch.dtype],
    place: torch.device,
) -> None:
    teacher = 2 * torch.randn(shape, device=place)
    student = teacher + torch.randn(shape, device=place)
    assert_right(loss_function, student.to(dtypes[0]), teacher.to(dtypes[1]))
    weight = torch.rand(shape[:-1], device=place)
    assert_right(loss_function, student.to(dtypes[0]), teacher.to(dtypes[1]), sample_weight=weight)


@pytest.mark.parametrize("closed", [slice(0, 4096), slice(4096, 8192), slice(4000, 9000)], ids=str)
def test_classes_switched_off_in_a_large_vocabulary(closed: slice, place: torch.device) -> None:
    """Whole tiles of the kernel hold -inf."""
    student, teacher = torch.randn(2, 2, 9000, device=place)
    student[0, closed], teacher[0, closed] = -torch.inf, -torch.inf
    assert_right(kl_divergence_loss, student, teacher, temperature=2.0)
    _, *gradients = value_and_gradients(kl_divergence_loss, student, teacher, temperature=2.0)
    for gradient in gradients:
        assert (gradient[0, closed] == 0).all()
        assert (gradient[1] != 0).all()


def test_a_class_that_only_the_student_rules_out_is_infinitely_far(place: torch.device) -> None:
    student, teacher = torch.randn(2, 2, 9000, device=place)
    student[0, :4500] = -torch.inf
    loss = kl_divergence_loss(student.requires_grad_(), teacher)
    assert loss == torch.inf
    (gradient,) = torch.autograd.grad(loss, student)
    with use_backend("reference"):
        (expected,) = torch.autograd.grad(kl_divergence_loss(student, teacher), student)
    torch.testing.assert_close(gradient, expected)


def test_a_class_whose_probability_fades_away_counts_no_more(place: torch.device) -> None:
    """It was infinitely far while it was the likeliest one, before the rest of the vocabulary was seen."""
    student, teacher = torch.randn(2, 1, 9000, device=place)
    student[0, 0] = -torch.inf
    teacher[0, 8000] = 300.0
    got = value_and_gradients(kl_divergence_loss, student, teacher)
    with use_backend("reference"):
        expected = value_and_gradients(kl_divergence_loss, student, teacher)
    for one, other in zip(got, expected, strict=True):
        torch.testing.assert_close(one, other)


@pytest.mark.parametrize("shift", [1000.0, -1000.0])
def test_a_common_shift_of_the_logits_costs_no_digits(shift: float, place: torch.device) -> None:
    """The shift and its sum with the logits are exact in float32."""
    teacher, step = (torch.randn(2, 3, 4100, device=place) * 64).round() / 64
    student = teacher + step
    plain = value_and_gradients(kl_divergence_loss, student, teacher)
    shifted = value_and_gradients(kl_divergence_loss, student + shift, teacher)
    for one, other in zip(plain, shifted, strict=True):
        assert torch.equal(one, other)
    assert kl_divergence_loss(teacher + shift, teacher) == 0


def test_maxima_that_rise_along_the_classes(place: torch.device) -> None:
    """Each tile moves the running maxima, the student's by more than the teacher's."""
    ramp = torch.linspace(0, 60, 9000, device=place)
    teacher = torch.stack((ramp, -ramp, ramp)) + torch.randn(3, 9000, device=place)
    student = torch.stack((3 * ramp, ramp, 0 * ramp)) + torch.randn(3, 9000, device=place)
    assert_right(kl_divergence_loss, student, teacher)


@pytest.mark.parametrize("loss_function", LOSSES)
@pytest.mark.parametrize("mask", [torch.tensor([1.0, 0, 2, 0]), torch.tensor([True, False, True, False])])
def test_fused_leaves_rows_out(loss_function: Callable[..., Tensor], mask: Tensor, place: torch.device) -> None:
    student, teacher = torch.randn(2, 4, 21, device=place)
    mask = mask.to(place)
    expected = value_and_gradients(loss_function, student[[0, 2]], teacher[[0, 2]], sample_weight=mask[[0, 2]].float())
    student[1], teacher[3] = torch.nan, torch.inf
    loss, *gradients = value_and_gradients(loss_function, student, teacher, sample_weight=mask)
    torch.testing.assert_close(loss, expected[0])
    for gradient, kept in zip(gradients, expected[1:], strict=True):
        torch.testing.assert_close(gradient[[0, 2]], kept)
        assert (gradient[[1, 3]] == 0).all()


@pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning")  # of numpy, in the interpreter
@pytest.mark.parametrize("loss_function", LOSSES)
@pytest.mark.parametrize("which", [0, 1])
@pytest.mark.parametrize("column", [0, 5000])
def test_nan_propagates(loss_function: Callable[..., Tensor], which: int, column: int, place: torch.device) -> None:
    inputs = torch.randn(2, 2, 9000, device=place).unbind()
    inputs[which][1, column] = torch.nan
    loss, student, teacher = value_and_gradients(loss_function, *inputs)
    assert loss.isnan()
    assert student[1].isnan().any()
    assert teacher[1].isnan().any()
    assert student[0].isfinite().all()
    assert teacher[0].isfinite().all()


@pytest.mark.parametrize("eps", [1e-8, 2.0, 100.0])
def test_cosine_below_eps_is_that_of_torch(eps: float, place: torch.device) -> None:
    student, teacher = torch.randn(2, 3, 5, device=place)
    student[1], teacher[2] = 0, 0
    assert_right(cosine_distance_loss, student, teacher, eps=eps)


def test_rows_are_read_where_they_are() -> None:
    kernel = pytest.importorskip("sdp_kernels.distillation.kernel")
    logits = torch.randn(2, 6, 9)
    for view in (logits, logits[:, :-1], logits[..., 1:], logits[1], logits[:, 2], logits[0, 0], logits[:, 1:4, :1]):
        rows = kernel.as_rows(view)
        assert rows.values.data_ptr() == view.data_ptr()
        flat = view.reshape(-1, view.shape[-1])
        for row, expected in enumerate(flat):
            start = view.storage_offset() + row // rows.inner * rows.outer_stride + row % rows.inner * rows.stride
            torch.testing.assert_close(logits.flatten()[start : start + len(expected)], expected, rtol=0, atol=0)
    for view in (logits.mT, logits[..., ::2], torch.randn(3, 3, 3, 3)[:, ::2, ::2]):
        assert kernel.as_rows(view).values.is_contiguous()


@pytest.mark.parametrize("loss_function", LOSSES)
def test_fused_takes_views(loss_function: Callable[..., Tensor], place: torch.device) -> None:
    student, teacher = torch.randn(2, 3, 5, 8, device=place)
    assert_right(loss_function, student[:, :-1], teacher[:, 1:])
    assert_right(loss_function, student[..., :5], teacher.transpose(0, 1).contiguous().transpose(0, 1)[..., 2:7])
    assert_right(loss_function, student.mT, teacher.mT)
    assert_right(loss_function, student, teacher[:1, :1].expand(3, 5, 8))


@pytest.mark.parametrize("loss_function", LOSSES)
def test_rows_may_lie_further_apart_than_32_bits_count(
    loss_function: Callable[..., Tensor], device: torch.device, triton_backend: str
) -> None:
    # On the host, only three pages of it are touched.
    apart = torch.empty_strided((3, 5), (2**30 + 16, 1), dtype=torch.float16, device=device)
    apart.copy_(torch.randn(3, 5))
    with use_backend(triton_backend):
        assert_right(loss_function, apart, torch.randn(3, 5, device=device))


@pytest.mark.parametrize("loss_function", LOSSES)
def test_only_gradients_asked_for_are_made(loss_function: Callable[..., Tensor], place: torch.device) -> None:
    student, teacher = torch.randn(2, 3, 21, device=place)
    _, *expected = value_and_gradients(loss_function, student, teacher)
    student.requires_grad_()
    torch.testing.assert_close(torch.autograd.grad(loss_function(student, teacher), student)[0], expected[0])
    (gradient,) = torch.autograd.grad(loss_function(student.detach(), teacher.requires_grad_()), teacher)
    torch.testing.assert_close(gradient, expected[1])
    with torch.no_grad():
        assert not loss_function(student, teacher).requires_grad


@pytest.mark.parametrize("loss_function", LOSSES)
def test_double_backward_raises(loss_function: Callable[..., Tensor], place: torch.device) -> None:
    student, teacher = torch.randn(2, 3, 21, device=place)
    student.requires_grad_()
    (gradient,) = torch.autograd.grad(loss_function(student, teacher), student, create_graph=True)
    with pytest.raises(RuntimeError, match="row_losses_backward"):
        gradient.sum().backward()


def test_half_gradients_are_scaled_before_they_are_rounded(place: torch.device) -> None:
    student, teacher = torch.randn(2, 400, 50, device=place).half()
    _, gradient, _ = value_and_gradients(lambda *rows: kl_divergence_loss(*rows) * 2.0**12, student, teacher)
    with use_backend("reference"):
        expected = value_and_gradients(kl_divergence_loss, student.double(), teacher.double())[1] * 2.0**12
    torch.testing.assert_close(gradient.double(), expected, rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("kind", ["kl", "cosine"])
@pytest.mark.parametrize("weighted", [True, False])
def test_operators_are_registered_rightly(kind: str, weighted: bool, fused: str, place: torch.device) -> None:
    student, teacher = torch.randn(2, 2, 3, 7, device=place)
    weight = torch.rand(2, 3, device=place) if weighted else None
    for asked in ((True, True), (True, False), (False, False)):
        rows = tuple(each.detach().requires_grad_(want) for each, want in zip((student, teacher), asked, strict=True))
        torch.library.opcheck(torch.ops.sdp_kernels.row_losses, (*rows, weight, kind, 0.5, fused))
        losses, statistics = torch.ops.sdp_kernels.row_losses(student, teacher, weight, kind, 0.5, fused)
        scale = torch.ones_like(losses)
        arguments = (scale, student, teacher, weight, losses, statistics, kind, 0.5, fused, *asked)
        torch.library.opcheck(torch.ops.sdp_kernels.row_losses_backward, arguments)


@pytest.mark.parametrize("loss_function", LOSSES)
def test_gradcheck_in_chunks(loss_function: Callable[..., Tensor], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpu, "CHUNK_ELEMENTS", 12)
    student, teacher = torch.randn(2, 4, 5, dtype=torch.float64)
    weight = torch.tensor([1.0, 0.0, 0.5, 2.0])
    inputs = student.requires_grad_(), teacher.requires_grad_()
    assert torch.autograd.gradcheck(lambda *rows: loss_function(*rows, sample_weight=weight), inputs)


@pytest.mark.parametrize("loss_function", LOSSES)
def test_fused_compiles_without_graph_breaks(loss_function: Callable[..., Tensor], place: torch.device) -> None:
    student, teacher = torch.randn(2, 4, 21, device=place)
    weight = torch.rand(4, device=place)
    expected = value_and_gradients(loss_function, student, teacher, sample_weight=weight)
    compiled = torch.compile(loss_function, fullgraph=True, backend="aot_eager")
    got = value_and_gradients(compiled, student, teacher, sample_weight=weight)
    for one, other in zip(got, expected, strict=True):
        torch.testing.assert_close(one, other)
