"""What every test shares. It is imported before any kernel, because Triton reads its switch on decoration."""

import os

import pytest
import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"
torch.set_num_threads(1)  # tiny tensors: on shared cores a second thread mostly waits


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)
