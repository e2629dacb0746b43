"""Steering of the distillation weight: its gradient keeps a chosen ratio to that of the task."""

from collections.abc import Sequence

import torch
from torch import Tensor

STEP = 2.0  # most that one measurement changes the weight, as a factor
RANGE = 1000.0  # most that the weight leaves its first value, as a factor


def steered_weight(weight: float, task_norm: float, distillation_norm: float, *, ratio: float, initial: float) -> float:
    """Return the distillation weight after a measurement.

    It is the weight at which weight * distillation_norm = ratio * task_norm, but at most twice and at least half the
    one before, and within a factor of 1000 of the first. The bounds keep it finite where the student equals its
    teacher, as before the first pruning step, and let one odd batch do little.

    Args:
        weight: the distillation weight until now, > 0.
        task_norm: norm of the gradient of the weighted task loss.
        distillation_norm: norm of the gradient of the sum of the distillation terms, without `weight`.
        ratio: wanted norm of the whole distillation gradient over that of the task gradient.
        initial: the weight that the training began with, > 0.
    """
    wanted = ratio * task_norm
    factor = STEP if wanted > STEP * weight * distillation_norm else wanted / (weight * distillation_norm or 1.0)
    factor = max(factor, 1.0 / STEP) if wanted or distillation_norm else 1.0
    return min(max(weight * factor, initial / RANGE), initial * RANGE)


def gradient_norm(loss: Tensor, parameters: Sequence[Tensor]) -> Tensor:
    """Return the norm of the gradient of `loss`, which keeps its graph, with respect to `parameters`, in fp32."""
    gradients = torch.autograd.grad(loss, parameters, retain_graph=True, allow_unused=True)
    norms = [torch.linalg.vector_norm(gradient, dtype=torch.float32) for gradient in gradients if gradient is not None]
    return torch.linalg.vector_norm(torch.stack(norms)) if norms else loss.new_zeros((), dtype=torch.float32)
