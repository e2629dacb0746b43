"""Kernels with known faults, compiled ahead of time by test_resources.py in a process of its own."""

# mypy: disable-error-code="no-untyped-def,untyped-decorator"

import json
import sys

import triton
import triton.language as tl

from bench.resources import compile_config, reasons_against
from sdp_kernels.spec import KernelConfig


@triton.jit
def product(a, b, out, rows, K: tl.constexpr, BLOCK: tl.constexpr):
    row = tl.arange(0, BLOCK)
    step = tl.arange(0, 32)
    total = tl.zeros((BLOCK, BLOCK), tl.float32)
    for start in range(0, K, 32):
        left = tl.load(a + row[:, None] * K + start + step[None, :])
        right = tl.load(b + (start + step)[:, None] * rows + row[None, :])
        total = tl.dot(left, right, total)
    tl.store(out + row[:, None] * rows + row[None, :], total)


@triton.jit
def quotient(a, out, rows, BLOCK: tl.constexpr):
    index = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    value = tl.load(a + index, mask=index < rows).to(tl.float32)
    tl.store(out + index, tl.sqrt(value) / (value + 1.0), mask=index < rows)


@triton.jit
def double(a, out, rows, BLOCK: tl.constexpr):
    index = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(out + index, 2 * tl.load(a + index, mask=index < rows), mask=index < rows)


HALF = {"a": "*fp16", "b": "*fp16", "out": "*fp32", "rows": "i32"}
PLANTED = {
    "good": KernelConfig(product, HALF, {"K": 256, "BLOCK": 64}, tensor_cores=True),
    "no matrix instruction": KernelConfig(double, HALF, {"BLOCK": 128}, tensor_cores=True),
    "spills": KernelConfig(product, HALF, {"K": 256, "BLOCK": 256}, num_warps=2, tensor_cores=True),
    "approximate": KernelConfig(quotient, HALF, {"BLOCK": 128}, exact=True),
    "too much shared memory": KernelConfig(
        product, HALF, {"K": 1024, "BLOCK": 256}, num_warps=8, num_stages=8, tensor_cores=True
    ),
}

if __name__ == "__main__":
    found: dict[str, dict[str, object]] = {capability: {} for capability in sys.argv[1:]}
    for capability, of_this in found.items():
        for name, config in PLANTED.items():
            resources = compile_config(config, int(capability))
            of_this[name] = {"reasons": reasons_against(config, int(capability), resources), **vars(resources)}
    json.dump(found, sys.stdout)
