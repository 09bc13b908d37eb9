"""Bundles on NVIDIA GPUs: TensorRT on Jetson, TensorRT-RTX on PCs. ``engine`` is where a bundle is opened."""
