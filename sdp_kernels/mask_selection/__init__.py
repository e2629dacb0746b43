"""Mask selection: op.py is the public function, threshold.py finds where to cut."""

from sdp_kernels.mask_selection.op import select_mask
from sdp_kernels.mask_selection.reference import select_mask_reference

__all__ = ["select_mask", "select_mask_reference"]
