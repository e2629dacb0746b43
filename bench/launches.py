"""What a case launches, found without a GPU: it runs on tensors that have sizes but no values.

The operators of sdp_kernels take their Triton path with such tensors, and each launch is written down instead of done.
"""

# mypy: disable-error-code="import-untyped,no-untyped-call"

import importlib
import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import cache, partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch._library.custom_ops import OPDEFS
from torch.utils._python_dispatch import TorchDispatchMode

import sdp_kernels
from bench.grid import DTYPES, MATMUL_PRECISIONS, Case, Grid
from bench.runner import Step, require_gradients
from sdp_kernels import use_backend
from sdp_kernels.compile_ahead import Specialisation, recorded, target_gpu

META = torch.device("meta")


class Launch(NamedTuple):
    """One launch of a kernel."""

    name: str  # what is compiled for it, as `recorded` names it
    specialisation: Specialisation
    programs: int


class _Implementations(TorchDispatchMode):
    """Runs what an operator of sdp_kernels does; with tensors without values, torch would only ask for its sizes."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        call = OPDEFS[func._schema.name]._init_fn if func.namespace == "sdp_kernels" else func
        return call(*args, **(kwargs or {}))


def launches_of(grid: Grid, case: Case, capability: int) -> list[Launch]:
    """What the contenders of a case that use sdp_kernels launch on a GPU of this compute capability (90 is 9.0).

    Where a call waits for the device, what comes after it is not seen.
    """
    torch.set_float32_matmul_precision(MATMUL_PRECISIONS[case.dtype])
    try:
        with target_gpu(capability), recorded() as found, _programs_noted(found) as launches:
            for name in grid.launching:
                _run(grid, case, name)
        return launches
    finally:
        torch.set_float32_matmul_precision("highest")


def _run(grid: Grid, case: Case, name: str) -> None:
    dtype = DTYPES[case.dtype]
    with META:  # where tensors are made unless told otherwise
        inputs = grid.outlines(case.shape, dtype) if grid.outlines else grid.inputs(case.shape, dtype, META)
    leaves = require_gradients(grid, inputs)
    try:
        with _Implementations(), use_backend("triton"):
            Step(grid.contenders()[name](inputs), leaves)()
    except NotImplementedError as error:
        if "no data" not in str(error):  # torch's words for a look at a value that is not there
            raise


@contextmanager
def _programs_noted(found: dict[str, Specialisation]) -> Iterator[list[Launch]]:
    """Note each launch with its number of programs, besides what is written down of it."""
    launches: list[Launch] = []

    def launch(kernel: Any, *args: Any, grid: Sequence[int], **options: Any) -> None:
        found.clear()
        type(kernel).run(kernel, *args, grid=grid, **options)
        launches.extend(Launch(name, entry, math.prod(grid)) for name, entry in found.items())

    kernels = _kernels()
    for kernel in kernels:
        kernel.run = partial(launch, kernel)
    try:
        yield launches
    finally:
        for kernel in kernels:
            del kernel.run


@cache
def _kernels() -> list[Any]:
    """The kernels of all ops."""
    from triton.runtime import JITFunction

    root = Path(sdp_kernels.__file__).parent
    names = (".".join(path.relative_to(root.parent).with_suffix("").parts) for path in root.rglob("kernel*.py"))
    values = (value for name in names for value in vars(importlib.import_module(name)).values())
    return list({id(value): value for value in values if isinstance(value, JITFunction)}.values())
