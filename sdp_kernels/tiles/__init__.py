"""What the Triton kernels of several ops share: launch.py chooses the tiles, kernel_columns.py works on them."""
