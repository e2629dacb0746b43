"""Checks of arguments. Each raises with the argument's name, the value got and what is allowed."""

from collections.abc import Sequence

import torch
from torch import Tensor


def check_choice(name: str, value: object, allowed: Sequence[object]) -> None:
    """A value among those allowed."""
    if value not in allowed:
        raise ValueError(f"{name} must be one of {list(allowed)}, got {value!r}")


def check_at_least(name: str, value: float, minimum: float) -> None:
    """A number that is not below the minimum; NaN is refused too."""
    if not value >= minimum:
        raise ValueError(f"{name} must be at least {minimum}, got {value!r}")


def check_above(name: str, value: float, bound: float) -> None:
    """A number above the bound; NaN is refused too."""
    if not value > bound:
        raise ValueError(f"{name} must be above {bound}, got {value!r}")


def check_floating(name: str, value: Tensor) -> None:
    """A tensor, and of a floating-point dtype."""
    if not isinstance(value, Tensor):
        raise TypeError(f"{name} must be a tensor, got {type(value).__name__}")
    if not value.is_floating_point():
        raise TypeError(f"{name} must be a floating-point tensor, got {value.dtype}")


def check_dims(name: str, value: Tensor, dims: int) -> None:
    """A tensor of so many dimensions."""
    if value.dim() != dims:
        raise ValueError(f"{name} must have {dims} dimensions, got shape {tuple(value.shape)}")


def check_shape(name: str, value: Tensor, expected: Sequence[int]) -> None:
    """A tensor of exactly this shape."""
    if tuple(value.shape) != tuple(expected):
        raise ValueError(f"{name} must have shape {tuple(expected)}, got {tuple(value.shape)}")


def check_same_device(name: str, value: Tensor, other_name: str, other: Tensor) -> None:
    """Two tensors on one device."""
    if value.device != other.device:
        raise ValueError(f"{name} must be on the device of {other_name}, {other.device}, got {value.device}")


def check_pair(student: Tensor, teacher: Tensor, student_name: str, teacher_name: str) -> None:
    """Two floating-point tensors of one shape on one device; their dtypes may differ."""
    check_floating(student_name, student)
    check_floating(teacher_name, teacher)
    check_shape(teacher_name, teacher, student.shape)
    check_same_device(teacher_name, teacher, student_name, student)


def check_sample_weight(sample_weight: Tensor | None, rows: Sequence[int], student: Tensor) -> None:
    """One weight a row, without a gradient of its own."""
    if sample_weight is None:
        return
    if not isinstance(sample_weight, Tensor):
        raise TypeError(f"sample_weight must be a tensor, got {type(sample_weight).__name__}")
    if sample_weight.is_complex():
        raise TypeError(f"sample_weight must be real, got {sample_weight.dtype}")
    check_shape("sample_weight", sample_weight, rows)
    check_same_device("sample_weight", sample_weight, "student", student)
    if sample_weight.requires_grad:
        raise ValueError("sample_weight must not require grad: no gradient is given for it")


def check_weight_values(sample_weight: Tensor | None, rows: int = 1) -> None:
    """No weight below 0 or NaN, and at least `rows` above 0.

    Only on a CPU and outside of compilation: elsewhere a look at the values stalls the device or breaks the graph.
    """
    if sample_weight is None or sample_weight.device.type != "cpu" or torch.compiler.is_compiling():
        return
    lowest = sample_weight.min().item()
    if not lowest >= 0:
        raise ValueError(f"sample_weight must be at least 0 everywhere, got {lowest}")
    counted = int(sample_weight.count_nonzero())
    if counted < rows:
        raise ValueError(
            f"sample_weight must be above 0 for at least {rows} rows, got {counted} of {sample_weight.numel()}"
        )


def compute_dtype(*tensors: Tensor) -> torch.dtype:
    """float64 if any input is, otherwise float32: losses are never computed in less."""
    if any(tensor.dtype == torch.float64 for tensor in tensors):
        return torch.float64
    return torch.float32
