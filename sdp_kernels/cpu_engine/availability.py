"""Whether the compiled engine can run here: numba may be missing, refuse the NumPy beside it, or have been forked."""

# mypy: disable-error-code="import-untyped,import-not-found"

import functools
import importlib
import importlib.util
import warnings

import torch

from sdp_kernels.dispatch import KERNEL_DTYPES

MISSING = "numba is not installed (pip install 'sdprune[cpu]')"

_forked = False


def is_compiled(dtype: torch.dtype) -> bool:
    """Whether the compiled engine takes products of this dtype."""
    return dtype in KERNEL_DTYPES and _numba_installed()


@functools.cache
def multiplies_bfloat16() -> bool:
    """Whether this CPU has instructions for bfloat16 products; numba must be installed."""
    import llvmlite.binding

    features = llvmlite.binding.get_host_cpu_features()
    return any(features.get(name, False) for name in ("avx512bf16", "amx-bf16", "bf16"))


def _numba_installed() -> bool:
    """Whether numba is there and may run threads: OpenMP ends a forked process whose parent ran them."""
    return _finds_numba() and not _forked


def _finds_numba() -> bool:
    """Whether numba can be imported; where it is installed and cannot, that is said once."""
    reason, told = _against_numba()
    if reason and not told:
        told.append(True)
        warnings.warn(f"block-sparse products on a CPU are plain torch: {reason}", RuntimeWarning, stacklevel=2)
    return reason is None


@functools.cache
def _against_numba() -> tuple[str | None, list[bool]]:
    """Why there is no numba, empty if it is just not installed, and whether that was told.

    By importing it: each numba refuses the versions of NumPy that are newer than itself, and only then.
    """
    if importlib.util.find_spec("numba") is None:
        return "", []
    try:
        importlib.import_module("numba")
    except ImportError as error:
        return str(error), []
    return None, []


@functools.cache
def tell_int8_is_plain() -> None:
    """Say once that int8 products are made without the compiled engine, and why."""
    reason, _ = _against_numba()
    if reason is None:
        reason = "this process was forked from one that ran the compiled engine"
    text = "int8 products on a CPU are plain torch, slower than float32"
    warnings.warn(f"{text}: {reason or MISSING}", RuntimeWarning, stacklevel=2)


def leave_threads_to_parent() -> None:
    """Called in a process that was forked when the engine was loaded: products are plain torch from here on."""
    global _forked
    _forked = True
