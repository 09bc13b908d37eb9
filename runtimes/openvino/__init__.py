"""Bundles on Intel processors: ``stock`` opens OpenVINO's own operators, ``native`` our kernels."""
