"""Aligned weight loss: op.py is the public function, reference.py its definition."""

from sdp_kernels.alignment.op import aligned_weight_loss
from sdp_kernels.alignment.reference import aligned_weight_loss_reference

__all__ = ["aligned_weight_loss", "aligned_weight_loss_reference"]
