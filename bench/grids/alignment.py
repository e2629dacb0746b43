"""The aligned weight loss, against its definition in plain torch."""

from bench.grid import elementwise_grid
from sdp_kernels.alignment.spec import SPEC

GRID = elementwise_grid(SPEC, SPEC.reference, captured=False)  # it reads layers by their addresses
