"""CUDA C++ kernels, compiled at first use for the GPU that is there."""
