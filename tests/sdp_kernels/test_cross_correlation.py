"""What is special to the cross-correlation loss: the published formula, its two forms, its edges."""

from typing import Any

import pytest
import torch
from torch import Tensor

from bench.grids.cross_correlation import load_lightly
from sdp_kernels import cross_correlation_loss, use_backend
from sdp_kernels.cross_correlation import choose_form, forms

FORMS = ("gram", "matrix")
TARGETS = ("identity", "teacher")


@pytest.fixture
def place(backend: str, device: torch.device, request: pytest.FixtureRequest) -> torch.device:
    """Where tensors must lie for the backend that a test takes as parameter."""
    if backend == "triton":
        request.getfixturevalue("triton_backend")
    return device if backend == "triton" else torch.device("cpu")


def features(batch: int, dim: int, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    teacher = torch.randn(batch, dim, dtype=torch.float64) + torch.randn(dim, dtype=torch.float64)
    student = 0.7 * teacher + 0.5 * torch.randn(batch, dim, dtype=torch.float64)
    return student.to(dtype), teacher.to(dtype)


def value_and_gradients(student: Tensor, teacher: Tensor, **options: Any) -> tuple[Tensor, Tensor, Tensor]:
    student, teacher = student.clone().requires_grad_(), teacher.clone().requires_grad_()
    loss = cross_correlation_loss(student, teacher, **options)
    return loss.detach(), *torch.autograd.grad(loss, (student, teacher))


def barlow_twins(z1: Tensor, z2: Tensor, lambd: float) -> Tensor:
    """https://github.com/facebookresearch/barlowtwins/blob/main/main.py, BarlowTwins.forward."""
    bn = torch.nn.BatchNorm1d(z1.shape[1], affine=False, dtype=z1.dtype)
    c = bn(z1).T @ bn(z2)
    c = c.div(z1.shape[0])
    on_diag = torch.diagonal(c).add(-1).pow(2).sum()
    n = c.shape[0]
    off_diag = c.flatten()[:-1].view(n - 1, n + 1)[:, 1:].flatten().pow(2).sum()
    return on_diag + lambd * off_diag


@pytest.mark.parametrize("shape", [(12, 40), (50, 20)])
def test_is_the_published_formula(shape: tuple[int, int]) -> None:
    student, teacher = features(*shape, torch.float64)
    student.requires_grad_()
    loss = cross_correlation_loss(student, teacher, off_diagonal_weight=0.0051, eps=1e-5)
    expected = barlow_twins(student, teacher, 0.0051)
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(torch.autograd.grad(loss, student)[0], torch.autograd.grad(expected, student)[0])


@pytest.mark.parametrize("shape", [(12, 40), (50, 20)])
def test_agrees_with_lightly(shape: tuple[int, int]) -> None:
    """An independent implementation, with its eps: https://github.com/lightly-ai/lightly."""
    lightly = load_lightly()
    if lightly is None:
        pytest.skip("lightly is not installed; see tests/README.md")
    student, teacher = features(*shape)
    student.requires_grad_()
    loss = cross_correlation_loss(student, teacher, eps=1e-5)
    expected = lightly(student, teacher)
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(torch.autograd.grad(loss, student)[0], torch.autograd.grad(expected, student)[0])


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("shape", [(2, 3), (9, 40), (20, 40), (40, 20)])
def test_both_forms_agree(shape: tuple[int, int], target: str) -> None:
    student, teacher = features(*shape, torch.float64)
    gram, matrix = (value_and_gradients(student, teacher, form=form, target=target) for form in FORMS)
    for name, one, other in zip(("loss", "student", "teacher"), gram, matrix, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-9, msg=name)


def test_form_is_chosen_by_sizes() -> None:
    assert choose_form(384, 768) == "gram"
    assert choose_form(385, 768) == "matrix"
    assert choose_form(1, 1) == "matrix"


@pytest.mark.parametrize("target", TARGETS)
def test_matrix_form_in_chunks(target: str, monkeypatch: pytest.MonkeyPatch) -> None:
    student, teacher = features(9, 23, torch.float64)
    whole = value_and_gradients(student, teacher, form="matrix", target=target)
    monkeypatch.setattr(forms, "MATRIX_CHUNK_ELEMENTS", 5 * 23)
    assert forms.chunk_rows(23) == 5
    chunked = value_and_gradients(student, teacher, form="matrix", target=target)
    for one, other in zip(whole, chunked, strict=True):
        torch.testing.assert_close(one, other)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("center", [True, False])
def test_gradcheck_with_weights(form: str, target: str, center: bool) -> None:
    student, teacher = (value.requires_grad_() for value in features(6, 5, torch.float64))
    sample_weight = torch.tensor([1.0, 0.5, 0.0, 2.0, 1.0, 0.25])

    def call(student: Tensor, teacher: Tensor) -> Tensor:
        return cross_correlation_loss(
            student,
            teacher,
            form=form,
            target=target,
            center=center,
            sample_weight=sample_weight,
            eps=0.1,
            off_diagonal_weight=0.5,
        )

    assert torch.autograd.gradcheck(call, (student, teacher))


def near_convergence(batch: int, dim: int) -> tuple[Tensor, Tensor]:
    """Student close to the teacher, features decorrelated as far as the batch allows."""
    teacher = torch.randn(batch, dim, dtype=torch.float64)
    teacher = torch.linalg.qr(teacher).Q if batch > dim else torch.linalg.qr(teacher.T).Q.T
    return teacher + 1e-3 * teacher.std() * torch.randn(batch, dim), teacher


def some_dead(batch: int, dim: int) -> tuple[Tensor, Tensor]:
    """One feature in three is constant, zero or far from zero."""
    student, teacher = features(batch, dim, torch.float64)
    student[:, ::6], student[:, 3::6], teacher[:, 1::9] = 0, 12345.678, -0.3
    return student, teacher


@pytest.mark.parametrize("make", [features, near_convergence, some_dead])
@pytest.mark.parametrize("shape", [(32, 64), (32, 384), (128, 256), (300, 500), (512, 384), (700, 96)])
def test_loses_no_more_than_the_matrix_in_float32(shape: tuple[int, int], make: Any, device: torch.device) -> None:
    """1e-5 of the value and twice the error of the plain definition, over five seeds; gradients by their norm."""
    ours, definition = [], []
    for seed in range(5):
        torch.manual_seed(seed)
        student, teacher = (value.float().to(device) for value in make(*shape))
        with use_backend("reference"):
            truth = value_and_gradients(student.double(), teacher.double())
            plain = value_and_gradients(student, teacher)
        got = value_and_gradients(student, teacher)
        ours.append([(one - other).norm() / other.norm() for one, other in zip(got, truth, strict=True)])
        definition.append([(one - other).norm() / other.norm() for one, other in zip(plain, truth, strict=True)])
    worst, worst_of_definition = torch.tensor(ours).amax(0), torch.tensor(definition).amax(0)
    for name, error, allowed in zip(("loss", "student", "teacher"), worst, worst_of_definition, strict=True):
        assert error <= 1e-5 + 2 * allowed, f"{name}: {error:.2g}, the definition {allowed:.2g}"


@pytest.mark.parametrize("backend", ["cpu", "reference", "triton"])
@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
@pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning")  # of numpy, in the interpreter
def test_nan_and_infinity_show(backend: str, bad: float, place: torch.device) -> None:
    student, teacher = (value.to(place) for value in features(8, 20))
    student[0, 0] = bad
    with use_backend(backend):
        assert cross_correlation_loss(student, teacher).isnan()


@pytest.mark.usefixtures("triton_backend")
def test_half_precision_that_could_overflow_is_multiplied_in_float32() -> None:
    """One row may hold every feature: then one entry of a Gram matrix gathers the squares of all of them."""
    from sdp_kernels.cross_correlation.kernel_tiles import product_dtype

    half, brain = torch.empty(4, 2**14, dtype=torch.float16), torch.empty(4, 2**14, dtype=torch.bfloat16)
    assert product_dtype(half, half, residual=False) == torch.float16
    assert product_dtype(half, half, residual=True) == torch.float32
    assert product_dtype(brain, brain, residual=True) == torch.bfloat16
    assert product_dtype(half, brain, residual=False) == torch.float32


def test_identity_target_is_zero_for_uncorrelated_features() -> None:
    features = torch.linalg.qr(torch.randn(20, 6, dtype=torch.float64)).Q
    loss = cross_correlation_loss(features, features, center=False, eps=0, off_diagonal_weight=1.0)
    assert loss < 1e-25


def test_teacher_target_is_zero_up_to_scale_and_shift() -> None:
    teacher = torch.randn(20, 6, dtype=torch.float64)
    student = teacher * (torch.rand(6) + 0.5) + torch.randn(6)
    assert cross_correlation_loss(student, teacher, target="teacher") < 1e-20
    assert cross_correlation_loss(-student, teacher, target="teacher") > 1


def test_teacher_target_off_diagonal_is_measured_from_the_teacher() -> None:
    student, teacher = features(20, 6, torch.float64)
    own = cross_correlation_loss(teacher, teacher, target="teacher", off_diagonal_weight=1.0)
    other = cross_correlation_loss(student, teacher, target="teacher", off_diagonal_weight=1.0)
    assert own < 1e-20 < 1e-3 < other


@pytest.mark.parametrize("backend", ["cpu", "reference", "triton"])
@pytest.mark.parametrize("target", TARGETS)
def test_weights_repeat_rows_and_leave_rows_out(backend: str, target: str, place: torch.device) -> None:
    student, teacher = (value.to(place) for value in features(6, 17))
    repeats = torch.tensor([1, 3, 0, 2, 1, 0], device=place)
    poisoned = student.clone(), teacher.clone()
    poisoned[0][2], poisoned[1][5] = torch.nan, torch.inf
    options: dict[str, Any] = {"target": target, "off_diagonal_weight": 0.1}
    repeated = (value.double().repeat_interleave(repeats, 0) for value in (student, teacher))
    expected = cross_correlation_loss(*repeated, **options)
    with use_backend(backend):
        loss, *gradients = value_and_gradients(*poisoned, sample_weight=repeats, **options)
    torch.testing.assert_close(loss.double(), expected, rtol=1e-4, atol=1e-5)
    for gradient in gradients:
        assert gradient.isfinite().all()
        assert (gradient[[2, 5]] == 0).all()
        assert (gradient[[0, 1, 3, 4]] != 0).any()


@pytest.mark.parametrize("backend", ["cpu", "reference", "triton"])
def test_weights_may_be_a_bool_mask(backend: str, place: torch.device) -> None:
    student, teacher = (value.to(place) for value in features(6, 17))
    mask = torch.tensor([True, False, True, True, False, True], device=place)
    with use_backend(backend):
        loss = cross_correlation_loss(student, teacher, sample_weight=mask)
    expected = cross_correlation_loss(student[mask].double(), teacher[mask].double())
    torch.testing.assert_close(loss, expected.float())


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("form", FORMS)
def test_all_weights_zero_give_finite_results(form: str, device: torch.device) -> None:
    student, teacher = (value.to(device) for value in features(4, 3))
    results = value_and_gradients(student, teacher, sample_weight=torch.zeros(4, device=device), form=form)
    assert all(result.isfinite().all() for result in results)


@pytest.mark.parametrize("backend", ["cpu", "reference", "triton"])
@pytest.mark.parametrize("constant", [0.0, 0.3, 12345.678])
@pytest.mark.parametrize("target", TARGETS)
def test_dead_features_give_no_correlation_and_no_gradient(
    backend: str, constant: float, target: str, place: torch.device
) -> None:
    student, teacher = (value.to(place) for value in features(10, 7))
    alive = cross_correlation_loss(student[:, 1:].double(), teacher[:, 1:].double(), target=target)
    student[:, 0], teacher[:, 0] = constant, constant
    with use_backend(backend):
        loss, *gradients = value_and_gradients(student, teacher, target=target)
    expected = alive + (1 if target == "identity" else 0)
    torch.testing.assert_close(loss.double(), expected, rtol=1e-5, atol=1e-6)
    for gradient in gradients:
        assert gradient.isfinite().all()
        assert (gradient[:, 0] == 0).all()


@pytest.mark.parametrize("shape", [(40, 100), (50, 100), (100, 60)])
def test_precise_near_convergence(shape: tuple[int, int]) -> None:
    """Student and teacher almost whitened: nearly all of the sum of squares is the diagonal."""
    left, _, right = torch.linalg.svd(torch.randn(shape, dtype=torch.float64), full_matrices=False)
    teacher = left @ right
    student = teacher + 1e-3 * torch.randn(shape, dtype=torch.float64) / shape[0] ** 0.5
    options = {"off_diagonal_weight": 0.005, "center": False}
    student, teacher = student.float(), teacher.float()
    truth = value_and_gradients(student.double(), teacher.double(), **options)
    got = value_and_gradients(student, teacher, **options)
    with use_backend("reference"):
        eager = value_and_gradients(student, teacher, **options)
    for value, plain, expected in zip(got, eager, truth, strict=True):
        allowed = 1e-5 * expected.abs().max() + 2 * (plain - expected).abs().max()
        assert (value - expected).abs().max() <= allowed


def test_student_and_teacher_may_differ_in_dtype() -> None:
    student, teacher = features(8, 30)
    student, teacher = student.half().requires_grad_(), teacher.bfloat16().requires_grad_()
    loss = cross_correlation_loss(student, teacher)
    assert loss.dtype == torch.float32
    loss.backward()
    assert student.grad is not None
    assert teacher.grad is not None
    assert student.grad.dtype == torch.float16
    assert teacher.grad.dtype == torch.bfloat16


def test_half_gradients_are_scaled_before_they_are_rounded() -> None:
    student, teacher = (value.half() for value in features(8, 30))
    student.requires_grad_()
    scale = 2.0**10
    (tiny,) = torch.autograd.grad(cross_correlation_loss(student, teacher) * 2.0**-20, student)
    (scaled,) = torch.autograd.grad(cross_correlation_loss(student, teacher) * 2.0**-20 * scale, student)
    (full,) = torch.autograd.grad(cross_correlation_loss(student, teacher), student)
    assert (scaled.float() / scale - full.float() * 2.0**-20).abs().max() < (
        tiny.float() - full.float() * 2.0**-20
    ).abs().max()


def test_no_gradient_is_made_unless_asked_for() -> None:
    student, teacher = features(8, 30)
    assert not cross_correlation_loss(student, teacher).requires_grad
    with torch.no_grad():
        assert not cross_correlation_loss(student.requires_grad_(), teacher).requires_grad
    loss = cross_correlation_loss(student.detach(), teacher.clone().requires_grad_())
    (gradient,) = torch.autograd.grad(loss * 3, loss.grad_fn.next_functions[1][0].variable)
    torch.testing.assert_close(gradient, 3 * value_and_gradients(student.detach(), teacher)[2])


def test_double_backward_raises() -> None:
    student, teacher = features(8, 30)
    loss = cross_correlation_loss(student.requires_grad_(), teacher)
    with pytest.raises(RuntimeError, match="does not support double backward"):
        torch.autograd.grad(loss, student, create_graph=True)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("weighted", [True, False])
def test_operator_is_registered_rightly(form: str, target: str, weighted: bool) -> None:
    student, teacher = features(5, 12)
    weight = torch.rand(5) if weighted else None
    for student_gradient, teacher_gradient in ((True, True), (True, False), (False, False)):
        arguments = (
            *(student, teacher, weight),
            *(0.01, True, target == "teacher", 1e-12, form, "cpu"),
            *(student_gradient, teacher_gradient),
        )
        torch.library.opcheck(torch.ops.sdp_kernels.cross_correlation, arguments)


# torch.compile itself makes an instance of every autograd.Function that it meets.
@pytest.mark.filterwarnings("default:.*should not be instantiated:DeprecationWarning")
def test_compiles_without_graph_breaks() -> None:
    student, teacher = features(8, 30)
    compiled = torch.compile(cross_correlation_loss, fullgraph=True, backend="aot_eager")
    inputs = student.clone().requires_grad_(), student.clone().requires_grad_()
    for call, student in zip((cross_correlation_loss, compiled), inputs, strict=True):
        call(student, teacher, sample_weight=torch.arange(8)).backward()
    assert inputs[0].grad is not None
    torch.testing.assert_close(inputs[0].grad, inputs[1].grad)
    with torch.no_grad():
        torch.testing.assert_close(compiled(student, teacher), cross_correlation_loss(student, teacher))


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize(
    ("shape", "form"),
    [
        pytest.param((130, 20), "matrix", id="rows in chunks"),
        pytest.param((40, 70), "matrix", id="columns in strips"),
        pytest.param((140, 290), "gram", id="Gram form of many rows"),
        pytest.param((5, 200), "gram", id="few rows, several strips a program"),
        pytest.param((40, 30), "gram", id="Gram form where it is not the choice"),
    ],
)
@pytest.mark.parametrize("weighted", [False, True])
def test_kernels_walk_over_any_shape(
    shape: tuple[int, int],
    form: str,
    target: str,
    weighted: bool,
    triton_backend: str,
    device: torch.device,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("sdp_kernels.cross_correlation.kernel_small.GRAM_PARTS", 3)
    student, teacher = (value.to(device) for value in features(*shape))
    options: dict[str, Any] = {"form": form, "target": target, "off_diagonal_weight": 0.1}
    if weighted:
        options["sample_weight"] = torch.rand(shape[0], device=device)
    expected = value_and_gradients(student.double(), teacher.double(), **options)
    with use_backend("reference"):
        eager = value_and_gradients(student, teacher, **options)
    with use_backend(triton_backend):
        got = value_and_gradients(student, teacher, **options)
        alone = cross_correlation_loss(student, teacher, **options)
    for one, other, plain in zip(got, expected, eager, strict=True):
        assert (one - other).norm() < 2 * (plain - other).norm() + 1e-6 * other.norm()
    torch.testing.assert_close(alone, got[0], rtol=0, atol=0)


def test_kernels_take_the_matrix_in_chunks(
    triton_backend: str, device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(forms, "MATRIX_CHUNK_ELEMENTS", 40 * 70)
    student, teacher = (value.to(device) for value in features(40, 70))
    expected = value_and_gradients(student.double(), teacher.double(), form="matrix")
    with use_backend(triton_backend):
        got = value_and_gradients(student, teacher, form="matrix")
    for one, other in zip(got, expected, strict=True):
        assert (one.double() - other).norm() < 2e-6 * other.norm()


@pytest.mark.parametrize("form", FORMS)
def test_half_precision_keeps_the_gradient_near_convergence(
    form: str, triton_backend: str, device: torch.device
) -> None:
    """Only the products are rounded: what is left of the gradient there is a difference of nearly equal columns."""
    teacher = torch.randn(20, 48, device=device).half()
    student = (teacher + 0.03 * torch.randn(20, 48, device=device)).half()
    options: dict[str, Any] = {"form": form, "off_diagonal_weight": 0.0}
    _, expected, _ = value_and_gradients(student.double(), teacher.double(), **options)
    student.requires_grad_()
    with use_backend(triton_backend):
        loss = cross_correlation_loss(student, teacher, **options) * 2**14  # as a loss scaler does
    (got,) = torch.autograd.grad(loss, student)
    assert (got.double() / 2**14 - expected).norm() < 1e-3 * expected.norm()


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_few_rows_take_few_launches(dtype: torch.dtype, device: torch.device) -> None:
    student, teacher = (value.to(device, dtype) for value in features(128, 8192))
    student.requires_grad_()

    def launches(call: Any) -> int:
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
            call()
            torch.cuda.synchronize()
        return sum(event.count for event in profile.key_averages() if event.device_type.name == "CUDA")

    cross_correlation_loss(student, teacher).backward()  # compiles
    losses = []
    assert launches(lambda: losses.append(cross_correlation_loss(student, teacher))) <= 3
    scale = torch.ones_like(losses[0])
    assert launches(lambda: torch.autograd.grad(losses[0], student, scale)) <= 2


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"student": torch.randn(4, 3, 2)}, ValueError, r"teacher must have shape \(4, 3, 2\), got \(4, 3\)"),
        ({"student": torch.randn(3), "teacher": torch.randn(3)}, ValueError, "student must have 2 dimensions"),
        ({"student": torch.ones(4, 3, dtype=torch.int32)}, TypeError, "student .* got torch.int32"),
        ({"teacher": [1.0]}, TypeError, "teacher must be a tensor, got list"),
        ({"student": torch.randn(1, 3), "teacher": torch.randn(1, 3)}, ValueError, r"at least 2 rows.*\(1, 3\)"),
        ({"off_diagonal_weight": -1.0}, ValueError, "off_diagonal_weight must be at least 0, got -1.0"),
        ({"off_diagonal_weight": float("nan")}, ValueError, "off_diagonal_weight .* got nan"),
        ({"eps": -1e-3}, ValueError, "eps must be at least 0, got -0.001"),
        ({"target": "student"}, ValueError, r"target must be one of \['identity', 'teacher'\], got 'student'"),
        ({"form": "fast"}, ValueError, "form must be one of .* got 'fast'"),
        ({"sample_weight": torch.ones(3)}, ValueError, r"sample_weight must have shape \(4,\), got \(3,\)"),
        ({"sample_weight": torch.zeros(4)}, ValueError, "sample_weight must be .* at least 2 rows, got 0 of 4"),
        ({"sample_weight": torch.tensor([0, 0, 3, 0])}, ValueError, "sample_weight must be .* 2 rows, got 1 of 4"),
        ({"sample_weight": torch.ones(4, dtype=torch.complex64)}, TypeError, "sample_weight must be real, got .*64"),
        ({"sample_weight": torch.tensor([1.0, -2.0, 1.0, 1.0])}, ValueError, "sample_weight must be .* got -2.0"),
        ({"sample_weight": torch.tensor([1.0, torch.nan, 1.0, 1.0])}, ValueError, "sample_weight must be .* got nan"),
        ({"sample_weight": [1.0] * 4}, TypeError, "sample_weight must be a tensor, got list"),
        ({"sample_weight": torch.ones(4, requires_grad=True)}, ValueError, "must not require grad"),
    ],
)
def test_bad_arguments(change: dict[str, Any], error: type[Exception], message: str) -> None:
    arguments = {"student": torch.randn(4, 3), "teacher": torch.randn(4, 3), **change}
    with pytest.raises(error, match=message):
        cross_correlation_loss(**arguments)


def test_one_row_is_enough_when_not_centred() -> None:
    loss = cross_correlation_loss(torch.ones(1, 3), torch.ones(1, 3), center=False, off_diagonal_weight=0.5)
    torch.testing.assert_close(loss, torch.tensor(3.0))
