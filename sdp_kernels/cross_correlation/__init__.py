"""Cross-correlation loss: op.py is the public function, reference.py its definition, forms.py its two forms.

The names around `loss_and_gradients` are for ops that compose this one.
"""

from sdp_kernels.cross_correlation.forms import (
    LossOptions,
    Options,
    checked_options,
    choose_form,
    decided_options,
    holds_columns,
)
from sdp_kernels.cross_correlation.op import cross_correlation_loss, loss_and_gradients
from sdp_kernels.cross_correlation.queue import RowQueue
from sdp_kernels.cross_correlation.reference import cross_correlation_loss_reference

__all__ = [
    "LossOptions",
    "Options",
    "RowQueue",
    "checked_options",
    "choose_form",
    "cross_correlation_loss",
    "cross_correlation_loss_reference",
    "decided_options",
    "holds_columns",
    "loss_and_gradients",
]
