"""Products of blocks on a CPU, below the ops that use them.

products.py takes the compiled engine (engine.py; it needs numba) where availability.py says that it can run, otherwise
plain torch (gathered.py). columns.py makes the compiled products of a masked weight, with both gradients (gradient.py),
and blocked_attention.py attends with the same tiles.
"""

from sdp_kernels.cpu_engine.availability import is_compiled, multiplies_bfloat16
from sdp_kernels.cpu_engine.gathered import values_product
from sdp_kernels.cpu_engine.products import attention, compiled_product, product

__all__ = ["attention", "compiled_product", "is_compiled", "multiplies_bfloat16", "product", "values_product"]
