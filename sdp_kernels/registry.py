"""The list of ops, for the contract tests and the benchmarks. Importing sdp_kernels does not import it."""

from sdp_kernels.alignment.spec import SPEC as ALIGNMENT
from sdp_kernels.block_sparse_linear.spec import SPEC as BLOCK_SPARSE_LINEAR
from sdp_kernels.cross_correlation.spec import SPEC as CROSS_CORRELATION
from sdp_kernels.distillation.spec import COSINE_SPEC, KL_SPEC
from sdp_kernels.mask_selection.spec import SPEC as MASK_SELECTION
from sdp_kernels.masked_linear.spec import SPEC as MASKED_LINEAR
from sdp_kernels.masked_linear_cross_correlation.spec import SPEC as MASKED_LINEAR_CROSS_CORRELATION
from sdp_kernels.spec import OpSpec

SPECS: dict[str, OpSpec] = {
    spec.name: spec
    for spec in (
        CROSS_CORRELATION,
        KL_SPEC,
        COSINE_SPEC,
        ALIGNMENT,
        MASKED_LINEAR,
        MASKED_LINEAR_CROSS_CORRELATION,
        MASK_SELECTION,
        BLOCK_SPARSE_LINEAR,
    )
}
