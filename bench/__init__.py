"""Benchmarks of `sdp_kernels`: `python -m bench NAME`. See bench/README.md."""
