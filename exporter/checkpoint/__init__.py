"""Checkpoints read lazily: Hugging Face folders and ids, PyTorch files, GGUF files."""

from cpm_edge.exporter.checkpoint.checkpoint import Assets, Checkpoint
from cpm_edge.exporter.checkpoint.open import open_checkpoint
from cpm_edge.exporter.checkpoint.tensors import TensorInfo

__all__ = ["Assets", "Checkpoint", "TensorInfo", "open_checkpoint"]
