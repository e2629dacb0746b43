"""The cross-correlation loss of a masked linear map's output: op.py is the public function."""

from sdp_kernels.masked_linear_cross_correlation.op import masked_linear_cross_correlation_loss
from sdp_kernels.masked_linear_cross_correlation.reference import masked_linear_cross_correlation_loss_reference

__all__ = ["masked_linear_cross_correlation_loss", "masked_linear_cross_correlation_loss_reference"]
