"""Distillation losses: op.py is the public functions, reference.py their definitions."""

from sdp_kernels.distillation.op import cosine_distance_loss, kl_divergence_loss
from sdp_kernels.distillation.reference import cosine_distance_loss_reference, kl_divergence_loss_reference

__all__ = [
    "cosine_distance_loss",
    "cosine_distance_loss_reference",
    "kl_divergence_loss",
    "kl_divergence_loss_reference",
]
