"""Grids of a small op, of which one kills its process, one hangs, and one raises; for test_gpu.py."""

import math
import os
import signal
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from bench.grid import Grid, Work, direct

SHAPES = ((4, 3), (8, 3), (16, 3))


def squares(x: Tensor) -> Tensor:
    return x.square().sum()


def dying(x: Tensor) -> Tensor:
    if x.device.type == "cpu" and len(x) == 8:
        os.kill(os.getpid(), signal.SIGSEGV)
    return squares(x)


def hanging(x: Tensor) -> Tensor:
    if x.device.type == "cpu" and len(x) == 4:
        time.sleep(3600)
    return squares(x)


def raising(x: Tensor) -> Tensor:
    if x.device.type == "cpu":
        raise NotImplementedError("not on this device")
    return squares(x)


def grid_of(name: str, ours: Callable[..., Any], baseline: Callable[..., Any] = squares) -> Grid:
    return Grid(
        name=name,
        shapes=SHAPES,
        inputs=lambda shape, dtype, device: {"x": torch.randn(shape, dtype=dtype, device=device)},
        reference=squares,
        contenders=lambda: {"ours": direct(ours), "eager": direct(baseline)},
        bound=lambda shape, itemsize: Work(2 * math.prod(shape), itemsize * math.prod(shape), 0),
        heaviest=lambda shape: Work(4 * math.prod(shape), 8 * math.prod(shape), 16 * math.prod(shape)),
        grad_args=("x",),
    )


GRIDS = {
    name: grid_of(name, ours)
    for name, ours in (("dying", dying), ("hanging", hanging), ("raising", raising), ("fine", squares))
}
GRIDS["dying_baseline"] = grid_of("dying_baseline", squares, dying)
