"""Block-sparse linear map: op.py is the public function, matrix.py the weight that it takes."""

from sdp_kernels.block_sparse_linear.matrix import BlockSparseMatrix
from sdp_kernels.block_sparse_linear.op import block_sparse_linear
from sdp_kernels.block_sparse_linear.reference import block_sparse_linear_reference

__all__ = ["BlockSparseMatrix", "block_sparse_linear", "block_sparse_linear_reference"]
