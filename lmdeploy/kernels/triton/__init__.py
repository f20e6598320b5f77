"""Kernels in Triton for GPUs of compute capability 8.0 and later. Nothing else in the package imports triton."""
