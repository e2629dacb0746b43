"""How compiled functions are made and run: numba's cache, numba's threads, and torch's beside them."""

# mypy: disable-error-code="no-untyped-call,no-any-return,import-untyped,import-not-found,attr-defined"

import os
import threading
from collections.abc import Callable
from typing import Any

import numba
import torch
from numba import njit

from sdp_kernels.cpu_engine.availability import leave_threads_to_parent

lock = threading.RLock()  # numba's simplest way of running threads allows one caller at a time
if hasattr(os, "register_at_fork"):  # not on Windows, which has no fork
    os.register_at_fork(after_in_child=leave_threads_to_parent)


def run_on_threads(threads: int, function: Callable[..., Any], *args: Any) -> None:
    """Call a compiled function on so many of numba's threads, and leave the counts of numba and torch as they were.

    torch may be told to use more threads than numba was started with, which is one for each core: then on all of these.
    """
    threads = min(threads, numba.config.NUMBA_NUM_THREADS)
    with lock:
        threads_of_torch = torch.get_num_threads()
        before = numba.get_num_threads()
        if before != threads:
            numba.set_num_threads(threads)
        try:
            function(*args)
        finally:
            if before != threads:
                numba.set_num_threads(before)
            if torch.get_num_threads() != threads_of_torch:  # both may share OpenMP, which numba sets up once
                torch.set_num_threads(threads_of_torch)


def compiled(**options: Any) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """numba's `njit`, with results kept on disk where that can be written."""

    def decorate(function: Callable[..., Any]) -> Callable[..., Any]:
        try:
            return njit(cache=True, **options)(function)
        except RuntimeError:  # neither the folder of this file nor the user's cache can be written
            return njit(**options)(function)

    return decorate
