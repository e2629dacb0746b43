"""Cross-correlation loss: op.py is the public function, reference.py its definition."""

from sdp_kernels.cross_correlation.forms import choose_form
from sdp_kernels.cross_correlation.op import cross_correlation_loss
from sdp_kernels.cross_correlation.queue import RowQueue
from sdp_kernels.cross_correlation.reference import cross_correlation_loss_reference

__all__ = ["RowQueue", "choose_form", "cross_correlation_loss", "cross_correlation_loss_reference"]
