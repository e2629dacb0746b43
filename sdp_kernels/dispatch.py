"""Which implementation runs: "triton", "cpu" or "reference".

* "triton": the fused kernels, on a CUDA tensor, or on a CPU tensor in Triton's interpreter. On a meta tensor, which has
  no values, nothing is launched.
* "cpu": what runs best for CPU tensors.
* "reference": plain torch, on any device; what "cpu" means for an op with nothing faster.

The fastest one that can run is taken, unless `use_backend` asks for another.
"""

import functools
import importlib.util
import os
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, ParamSpec, TypeVar

import torch
from torch import Tensor
from torch.amp import is_autocast_available
from torch.autograd import forward_ad
from torch.utils._python_dispatch import is_in_torch_dispatch_mode

from sdp_kernels.checks import check_choice

BACKENDS = ("triton", "cpu", "reference")
OFFERS = BACKENDS  # of an op that has all of them, the fastest first
PLAIN = (Tensor, torch.nn.Parameter)  # types that nothing watches: an operator's function may be called directly
KERNEL_DTYPES = (torch.float32, torch.float16, torch.bfloat16)
# Kinds of devices that torch knows autocast for, whether there is one or not. The torch.compile of 2.11 cannot ask.
AUTOCAST_DEVICES = tuple(kind for kind in ("cpu", "cuda", "xpu", "mps", "hpu", "xla") if is_autocast_available(kind))


class _Choice:
    """What `use_backend` asks for."""

    forced: str | None = None


class _Thread(threading.local):
    """The choice of this thread, an object in which torch.compile notices a change.

    It cannot read a ContextVar, and that of torch 2.11 takes what lies right in a `threading.local` for constant.
    """

    def __init__(self) -> None:
        self.choice = _Choice()


_thread = _Thread()


@contextmanager
def use_backend(name: str) -> Iterator[None]:
    """Run every op called inside the `with` block on one backend.

    Args:
        name: "triton", "cpu" or "reference". An op that cannot run there raises `NotImplementedError`
            with all its reasons instead of silently taking another.

    Raises:
        ValueError: the name is none of these.

    Example:
        >>> with use_backend("reference"):
        ...     kl_divergence_loss(torch.zeros(1, 2), torch.zeros(1, 2))
        tensor(0.)
    """
    check_choice("name", name, BACKENDS)
    choice = _thread.choice
    before, choice.forced = choice.forced, name
    try:
        yield
    finally:
        choice.forced = before


def choose_backend(
    op: str, tensors: Sequence[Tensor], offers: Sequence[str], against_triton: Sequence[str] = ()
) -> str:
    """The backend that runs `op` on these tensors.

    Args:
        op: name of the op, for the message.
        tensors: the floating-point inputs.
        offers: backends the op implements, the fastest first, ending with "reference".
        against_triton: the op's own reasons why its kernels cannot run on this input.

    Raises:
        NotImplementedError: `use_backend` asked for a backend that cannot run; lists every reason. Or a tensor
            carries a tangent of forward-mode differentiation, which the operators would drop without a word.
    """
    if not torch.compiler.is_compiling() and any(map(_has_tangent, tensors)):
        raise NotImplementedError(f"{op} has no forward-mode derivative; differentiate backward")
    forced = _thread.choice.forced
    if forced is not None:
        reasons = reasons_against(forced, tensors, offers, against_triton)
        if reasons:
            raise NotImplementedError(f"{op} cannot run on backend {forced!r}: " + "; ".join(reasons))
        return forced if forced in offers else "reference"
    for backend in offers:
        if not _would_run_badly(backend, tensors) and not reasons_against(backend, tensors, offers, against_triton):
            return backend
    return "reference"


def reasons_against(
    backend: str, tensors: Sequence[Tensor], offers: Sequence[str], against_triton: Sequence[str] = ()
) -> list[str]:
    """Every reason why `backend` cannot run on these tensors; empty if it can."""
    reasons: list[str] = []
    if backend == "triton":
        if "triton" not in offers:
            return ["it has no Triton kernel"]
        reasons += against_triton
        if not _triton_installed():
            reasons.append("triton is not installed")
        for tensor in tensors:
            if tensor.dtype not in KERNEL_DTYPES:
                reasons.append(f"dtype {tensor.dtype} is none of {[str(dtype) for dtype in KERNEL_DTYPES]}")
            if tensor.dtype == torch.bfloat16 and _lacks_bfloat16(tensor.device):
                reasons.append(f"{tensor.device} has no bfloat16 arithmetic")
            if tensor.device.type not in ("cuda", "meta") and not _interpreting():
                reasons.append(f"a tensor is on {tensor.device}, not on CUDA, and TRITON_INTERPRET is not set")
    if backend == "cpu":
        reasons += [f"a tensor is on {tensor.device}" for tensor in tensors if tensor.device.type != "cpu"]
    return list(dict.fromkeys(reasons))


P = ParamSpec("P")
T = TypeVar("T")


def on_its_device(launch: Callable[P, T]) -> Callable[P, T]:
    """Run a function that launches kernels with the device of its first argument (a tensor, or a list) as current.

    Triton launches on the current device, wherever the tensors are.
    """

    @functools.wraps(launch)
    def wrapped(*args: P.args, **kwargs: P.kwargs) -> T:
        first: Any = args[0]
        with torch.cuda.device_of(first if isinstance(first, Tensor) else first[0]):  # type: ignore[no-untyped-call]
            return launch(*args, **kwargs)

    return wrapped


def autocast_dtype(tensor: Tensor) -> torch.dtype | None:
    """What autocast would convert this input of a product to; None where it leaves it alone."""
    device = tensor.device.type
    if tensor.dtype == torch.float64 or device not in AUTOCAST_DEVICES:
        return None
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else None


def without_autocast(tensor: Tensor) -> torch.autocast:
    """A context in which autocast leaves the dtypes of this tensor's device alone."""
    return torch.autocast("cpu" if tensor.is_meta else tensor.device.type, enabled=False)


def needs_gradient(*tensors: Tensor | None) -> bool:
    """Whether autograd will ask for the gradient of any of these."""
    return torch.is_grad_enabled() and any(tensor is not None and tensor.requires_grad for tensor in tensors)


def capability_of(device: torch.device) -> int:
    """The compute capability that kernels are launched for: 90 is 9.0, and that of the interpreter is 80.

    For meta tensors it is the one that Triton compiles for.
    """
    if device.type == "meta":
        from triton.runtime import driver

        return int(driver.active.get_current_target().arch)
    major, minor = torch.cuda.get_device_capability(device) if device.type == "cuda" else (8, 0)
    return 10 * major + minor


def is_watched(*tensors: Tensor) -> bool:
    """Whether something may record operators on these tensors, or run something else in their place.

    Where it does not, the function of an operator may be called directly: with little work, the operator's way to it
    takes as long. Who records operators must see one, because functions write through numpy and Triton.
    """
    tracing = torch.jit.is_tracing()  # type: ignore[attr-defined,no-untyped-call]
    recording = tracing or torch.compiler.is_compiling() or is_in_torch_dispatch_mode()
    return recording or any(type(tensor) not in PLAIN or tensor.is_meta for tensor in tensors)


def is_captured(tensor: Tensor) -> bool:
    """Whether work on this tensor goes into a CUDA graph now, instead of being done."""
    return tensor.is_cuda and torch.cuda.is_current_stream_capturing()


def float32_precision() -> str:
    """How float32 matrices are to be multiplied on CUDA, "tf32" or "ieee": torch's switch, in `tl.dot`'s words."""
    return "tf32" if torch.backends.cuda.matmul.fp32_precision == "tf32" else "ieee"


def _has_tangent(tensor: Tensor) -> bool:
    return forward_ad.unpack_dual(tensor).tangent is not None  # type: ignore[no-untyped-call]


def _would_run_badly(backend: str, tensors: Sequence[Tensor]) -> bool:
    """Triton's interpreter is for tests: taken only when asked for."""
    return backend == "triton" and any(tensor.device.type != "cuda" for tensor in tensors)


def _lacks_bfloat16(device: torch.device) -> bool:
    if device.type != "cuda" or torch.compiler.is_compiling():
        return False
    return torch.cuda.get_device_capability(device) < (8, 0)


def _triton_installed() -> bool:
    return importlib.util.find_spec("triton") is not None


def _interpreting() -> bool:
    return os.environ.get("TRITON_INTERPRET", "0") == "1"
