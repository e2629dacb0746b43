"""The cosine distance of rows, against torch.nn.functional."""

import torch.nn.functional as F
from torch import Tensor

from bench.grid import elementwise_grid
from sdp_kernels.distillation.spec import COSINE_SPEC


def eager(student: Tensor, teacher: Tensor, *, eps: float = 1e-8) -> Tensor:
    """As one writes it."""
    return (1 - F.cosine_similarity(student, teacher, dim=-1, eps=eps)).mean()


GRID = elementwise_grid(COSINE_SPEC, eager)
