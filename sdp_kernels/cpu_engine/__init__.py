"""Products of blocks on a CPU, below the ops that use them.

products.py takes the compiled engine (engine.py, gradient.py; they need numba) where availability.py says that it can
run, otherwise plain torch (gathered.py).
"""

from sdp_kernels.cpu_engine.availability import is_compiled, multiplies_bfloat16
from sdp_kernels.cpu_engine.gathered import values_product
from sdp_kernels.cpu_engine.products import int8_product, product

__all__ = ["int8_product", "is_compiled", "multiplies_bfloat16", "product", "values_product"]
