"""The table of benchmarks, the most telling first: one file and one entry each."""

from bench.grid import Grid
from bench.grids.alignment import GRID as ALIGNMENT
from bench.grids.block_sparse import GRID as BLOCK_SPARSE
from bench.grids.cosine_distance import GRID as COSINE_DISTANCE
from bench.grids.cross_correlation import GRID as CROSS_CORRELATION
from bench.grids.kl_divergence import GRID as KL_DIVERGENCE
from bench.grids.masked_linear import GRID as MASKED_LINEAR
from bench.grids.select_mask import GRID as SELECT_MASK
from bench.grids.training_step import GRID as TRAINING_STEP

GRIDS: dict[str, Grid] = {
    grid.name: grid
    for grid in (
        BLOCK_SPARSE,
        MASKED_LINEAR,
        TRAINING_STEP,
        CROSS_CORRELATION,
        KL_DIVERGENCE,
        COSINE_DISTANCE,
        SELECT_MASK,
        ALIGNMENT,
    )
}
