"""The Triton kernels on an NVIDIA GPU: their results against the references, and their speed."""
