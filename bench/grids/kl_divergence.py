"""The KL divergence of logits, against torch.nn.functional."""

import torch.nn.functional as F
from torch import Tensor

from bench.grid import elementwise_grid
from sdp_kernels.distillation.spec import KL_SPEC


def eager(student_logits: Tensor, teacher_logits: Tensor, *, temperature: float = 1.0) -> Tensor:
    """As one writes it: F.kl_div of two log-softmaxes."""
    log_student = F.log_softmax(student_logits.flatten(0, -2) / temperature, -1)
    log_teacher = F.log_softmax(teacher_logits.flatten(0, -2) / temperature, -1)
    return F.kl_div(log_student, log_teacher, log_target=True, reduction="batchmean") * temperature**2


GRID = elementwise_grid(KL_SPEC, eager)
