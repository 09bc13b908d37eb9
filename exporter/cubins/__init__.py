"""Triton kernels compiled ahead of time for a device, with an index that its launcher reads."""
