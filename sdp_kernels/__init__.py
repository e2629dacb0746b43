"""Losses and linear maps for self-distilled pruning; Triton kernels where they can run, torch elsewhere."""

from sdp_kernels.alignment import aligned_weight_loss
from sdp_kernels.block_sparse_linear import BlockSparseMatrix, block_sparse_linear
from sdp_kernels.cross_correlation import RowQueue, cross_correlation_loss
from sdp_kernels.dispatch import use_backend
from sdp_kernels.distillation import cosine_distance_loss, kl_divergence_loss
from sdp_kernels.mask_selection import select_mask
from sdp_kernels.masked_linear import masked_linear, zero_
from sdp_kernels.masked_linear_cross_correlation import masked_linear_cross_correlation_loss
from sdp_kernels.masks import BitMask

__all__ = [
    "BitMask",
    "BlockSparseMatrix",
    "RowQueue",
    "aligned_weight_loss",
    "block_sparse_linear",
    "cosine_distance_loss",
    "cross_correlation_loss",
    "kl_divergence_loss",
    "masked_linear",
    "masked_linear_cross_correlation_loss",
    "select_mask",
    "use_backend",
    "zero_",
]
