"""Every kernel compiles for the GPUs we name, without one: in a process where Triton does not interpret."""

import os
import subprocess
import sys

import pytest

COMPILE = """
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from sdp_kernels.cross_correlation import kernel

def compile_for(capability, function, types, constants):
    names = function.arg_names
    signature = {name: "constexpr" if name in constants else types[name] for name in names}
    source = ASTSource(
        fn=function,
        signature=signature,
        constexprs={(names.index(name),): value for name, value in constants.items()},
    )
    binary = triton.compile(source, target=GPUTarget("cuda", capability, 32))
    assert binary.metadata.shared <= 99 * 1024, binary.metadata.shared
    assert len(binary.asm["cubin"]) > 0

def types_of(function, features):
    floats = {name: "*fp32" for name in function.arg_names}
    return floats | {"student": features, "teacher": features,
        "batch": "i32", "dim": "i32", "eps": "fp32", "dead_limit": "fp32"}

for capability in (80, 90, 120):
    for features in ("*fp32", "*bf16"):
        for flag in (True, False):
            block_batch, block_dim = kernel.launch_sizes(2048, 8192 if flag else 768)
            blocks = {"HAS_WEIGHT": flag, "BLOCK_BATCH": block_batch, "BLOCK_DIM": block_dim}
            normalise, gradient = kernel._normalise_kernel, kernel._feature_gradient_kernel
            compile_for(capability, normalise, types_of(normalise, features),
                        {"CENTER": flag, "RESIDUAL": flag, **blocks})
            compile_for(capability, gradient, types_of(gradient, features), blocks)
"""


@pytest.mark.usefixtures("triton_backend")
def test_kernels_compile_for_every_named_gpu() -> None:
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run([sys.executable, "-c", COMPILE], capture_output=True, text=True, check=False, env=environment)
    assert done.returncode == 0, done.stderr
