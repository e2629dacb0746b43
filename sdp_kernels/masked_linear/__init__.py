"""Masked linear map: op.py is the public function, products.py its three products, zero.py zeroing in place.

The last names of the list are for ops that compose this one: they let a kernel make the output and do more with it.
"""

from sdp_kernels.masked_linear.arguments import Masking, Teacher, has_kernel, mask_arguments
from sdp_kernels.masked_linear.op import check_arguments, masked_linear, masked_linear_backward
from sdp_kernels.masked_linear.products import kernel_product
from sdp_kernels.masked_linear.reference import masked_linear_reference
from sdp_kernels.masked_linear.zero import zero_

__all__ = [
    "Masking",
    "Teacher",
    "check_arguments",
    "has_kernel",
    "kernel_product",
    "mask_arguments",
    "masked_linear",
    "masked_linear_backward",
    "masked_linear_reference",
    "zero_",
]
