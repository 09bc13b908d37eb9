"""Our CPU kernels alone, against what the machine can do at most."""
