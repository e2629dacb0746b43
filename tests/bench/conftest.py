"""A machine whose ceilings are known without measuring them."""

import pytest
import torch

from bench.machine import Machine


@pytest.fixture
def machine() -> Machine:
    rates = {"fp32": 1e12, "fp64": 1e11}
    return Machine(torch.device("cpu"), "CPU of the tests", copy_rate=1e10, matmul_rates=rates, memory=2**30)
