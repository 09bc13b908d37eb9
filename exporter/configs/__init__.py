"""Checkpoint configs: one dataclass an architecture family, Hugging Face's key names, no torch."""

from cpm_edge.exporter.configs.llama import LlamaConfig
from cpm_edge.exporter.configs.minicpm import MiniCPMConfig
from cpm_edge.exporter.configs.minicpm_moe import MiniCPMMoEConfig
from cpm_edge.exporter.configs.minicpm_sala import MiniCPMSALAConfig

__all__ = ["LlamaConfig", "MiniCPMConfig", "MiniCPMMoEConfig", "MiniCPMSALAConfig"]
