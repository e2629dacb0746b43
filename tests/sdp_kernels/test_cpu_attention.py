"""Attention on the compiled engine: against float64, masks of every shape, and what lies in memory around it."""

import math
import os
import platform
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from sdp_kernels.cpu_engine import attention

pytestmark = pytest.mark.usefixtures("numba")

SHAPES = [  # batch, heads, queries, keys, depth, width
    (2, 3, 7, 7, 8, 8),
    (1, 1, 1, 1, 1, 1),
    (2, 2, 32, 12, 64, 64),
    (1, 2, 33, 50, 5, 7),
    (3, 1, 65, 31, 16, 40),
    (1, 3, 1, 100, 24, 3),
    (2, 2, 128, 128, 64, 64),
]


def made(shape: tuple[int, ...], dtype: torch.dtype = torch.float32) -> list[Tensor]:
    batch, heads, queries, keys, depth, width = shape
    sizes = (queries, depth), (keys, depth), (keys, width)
    return [torch.randn(batch, heads, *size).to(dtype) for size in sizes]


def assert_as_torch(inputs: list[Tensor], mask: Tensor | None, scale: float) -> None:
    """Twice as far from float64 as torch's own at most, beside a little."""
    exact = mask.double() if mask is not None and mask.is_floating_point() else mask
    truth = scaled_dot_product_attention(*(each.double() for each in inputs), attn_mask=exact, scale=scale)
    same = mask.to(inputs[0].dtype) if mask is not None and mask.is_floating_point() else mask
    lost = (scaled_dot_product_attention(*inputs, attn_mask=same, scale=scale).double() - truth).abs().max()
    got = attention(*inputs, mask, scale)
    assert got.dtype == inputs[0].dtype
    assert got.transpose(1, 2).is_contiguous()
    torch.testing.assert_close(got.double(), truth, rtol=0, atol=2 * float(lost) + 1e-6)


@pytest.mark.parametrize("threads", [1, 2, 300])  # also more than there are cores
@pytest.mark.parametrize("shape", SHAPES)
def test_shapes(shape: tuple[int, ...], threads: int, nan_filled_memory: None) -> None:
    torch.set_num_threads(threads)
    try:
        assert_as_torch(made(shape), None, 1 / math.sqrt(shape[4]))
    finally:
        torch.set_num_threads(1)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_smaller_dtypes(dtype: torch.dtype) -> None:
    assert_as_torch(made((2, 2, 20, 30, 16, 8), dtype), None, 0.3)


@pytest.mark.parametrize("kind", ["bool", "added"])
@pytest.mark.parametrize("lead", [(2, 3), (1, 3), (2, 1), (1, 1)])
@pytest.mark.parametrize("queries", [1, 37])
def test_masks(kind: str, lead: tuple[int, int], queries: int) -> None:
    inputs = made((2, 3, 37, 26, 8, 8))
    mask = torch.rand(*lead, queries, 26) < 0.7
    mask[..., 3] = True
    assert_as_torch(inputs, mask if kind == "bool" else torch.randn(mask.shape).masked_fill(~mask, -torch.inf), 0.4)


def test_masks_that_are_views() -> None:
    inputs, keys = made((2, 3, 37, 26, 8, 8)), torch.rand(2, 1, 1, 26) < 0.7
    keys[..., 0] = True
    for mask in (keys.expand(2, 1, 37, 26), keys[0, 0], keys[..., :1].expand(2, 1, 1, 26)):
        assert_as_torch(inputs, mask, 0.4)


def test_a_query_that_sees_nothing_gets_zeros() -> None:
    inputs = made((1, 2, 5, 9, 4, 4))
    mask = torch.ones(5, 9, dtype=torch.bool)
    mask[2] = False
    got = attention(*inputs, mask, 0.5)
    assert not got[:, :, 2].any()
    assert got[:, :, 3].all()


def test_large_scores_and_what_is_not_finite() -> None:
    query, key, value = made((1, 1, 4, 6, 8, 8))
    assert_as_torch([query * 100, key * 100, value], None, 1.0)
    for bad in (torch.nan, torch.inf):
        inputs = [query.clone(), key, value]
        inputs[0][0, 0, 1, 3] = bad
        got, expected = attention(*inputs, None, 0.5), (inputs[0] @ key.mT * 0.5).softmax(-1) @ value
        assert torch.equal(got.isnan(), expected.isnan())  # torch's own makes zeros of them
        assert got.isnan().any()


def test_inputs_that_are_views() -> None:
    together = torch.randn(2, 19, 3, 4, 16)  # query, key and value of one product
    views = [together[:, :, i].transpose(1, 2) for i in range(3)]
    assert_as_torch(views, None, 0.25)
    across = [torch.randn(2, 4, 16, 19).transpose(2, 3) for _ in range(3)]
    assert_as_torch(across, None, 0.25)


NARROWER_REGISTERS = """
import sys, torch
from sdp_kernels.cpu_engine import attention, vectors
for queries, keys, depth, width in ((1, 1, 1, 1), (19, 33, 24, 10), (40, 7, 5, 64)):
    query, key, value = torch.randn(2, queries, depth), torch.randn(2, keys, depth), torch.randn(2, keys, width)
    expected = torch.nn.functional.scaled_dot_product_attention(query, key, value, scale=0.3)
    got = attention(query[None], key[None], value[None], None, 0.3)
    torch.testing.assert_close(got[0], expected)
assert vectors.LANES == int(sys.argv[1])
"""


@pytest.mark.skipif(platform.machine() not in ("x86_64", "AMD64"), reason="not x86")
@pytest.mark.parametrize(("lanes", "name", "features"), [(8, "haswell", "+avx,+avx2,+fma"), (4, "nehalem", "+sse4.2")])
def test_narrower_registers(lanes: int, name: str, features: str, tmp_path: Path) -> None:
    settings = {"NUMBA_CPU_NAME": name, "NUMBA_CPU_FEATURES": features, "NUMBA_CACHE_DIR": str(tmp_path)}
    command = [sys.executable, "-c", NARROWER_REGISTERS, str(lanes)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=os.environ | settings)
    assert done.returncode == 0, done.stderr
