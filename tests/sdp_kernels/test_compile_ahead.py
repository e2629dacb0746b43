"""Every kernel compiles for GPUs that are not there; `python -m bench resources` does it for all configurations."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from sdp_kernels.registry import SPECS

MODULES = sorted({spec.kernel_module for spec in SPECS.values() if spec.kernel_module})
COMPILE = """
import sys
from bench.resources import compile_config, configurations, label, reasons_against

for capability in (80, 120):
    first_of_each_kernel = {}
    for config in configurations(sys.argv[1], capability):
        first_of_each_kernel.setdefault(config.kernel.fn.__qualname__ + config.kernel.fn.__module__, config)
    for config in first_of_each_kernel.values():
        reasons = reasons_against(config, capability, compile_config(config, capability))
        assert not reasons, (label(config), capability, reasons)
print(len(first_of_each_kernel), "kernels")
"""


@pytest.mark.parametrize("module", MODULES)
def test_kernels_compile_ahead_of_time(module: str) -> None:
    """In a process of its own, because this one may interpret kernels instead of compiling them."""
    pytest.importorskip("triton")
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    root = Path(__file__).parents[2]
    command = [sys.executable, "-c", COMPILE, module]
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment, cwd=root)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout.split()[0]) >= 1
