"""Masked linear map: op.py is the public function, bitmask.py the packed mask, zero.py zeroing in place."""

from sdp_kernels.masked_linear.bitmask import BitMask
from sdp_kernels.masked_linear.op import masked_linear
from sdp_kernels.masked_linear.reference import masked_linear_reference
from sdp_kernels.masked_linear.zero import zero_

__all__ = ["BitMask", "masked_linear", "masked_linear_reference", "zero_"]
