"""Mask selection: op.py is the public function, threshold.py finds where to cut."""

from sdp_kernels.mask_selection.op import pruned_count, select_mask
from sdp_kernels.mask_selection.reference import select_mask_reference

__all__ = ["pruned_count", "select_mask", "select_mask_reference"]
