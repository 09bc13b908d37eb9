"""Checkpoints read lazily: Hugging Face folders and ids, PyTorch files, GGUF files."""

from cpm_edge.exporter.checkpoint.checkpoint import Assets, Checkpoint
from cpm_edge.exporter.checkpoint.open import open_checkpoint
from cpm_edge.exporter.checkpoint.tensors import TensorInfo
from cpm_edge.exporter.checkpoint.tokenizer_check import check_tokenizer

__all__ = ["Assets", "Checkpoint", "TensorInfo", "check_tokenizer", "open_checkpoint"]
