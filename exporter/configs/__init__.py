"""Checkpoint configs: one dataclass an architecture family, Hugging Face's key names, no torch."""

from cpm_edge.exporter.configs.llama import LlamaConfig
from cpm_edge.exporter.configs.minicpm import MiniCPMConfig, MuPConfig
from cpm_edge.exporter.configs.minicpm3 import MiniCPM3Config
from cpm_edge.exporter.configs.minicpm_moe import MiniCPMMoEConfig
from cpm_edge.exporter.configs.minicpm_sala import MiniCPMSALAConfig

__all__ = [
    "LlamaConfig",
    "MiniCPM3Config",
    "MiniCPMConfig",
    "MiniCPMMoEConfig",
    "MiniCPMSALAConfig",
    "MuPConfig",
]
