"""Which checkpoint architectures there are, and where they live. Imports no torch."""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from cpm_edge.exporter.configs import (
    LlamaConfig,
    MiniCPM3Config,
    MiniCPMConfig,
    MiniCPMMoEConfig,
    MiniCPMSALAConfig,
)
from cpm_edge.exporter.errors import ConfigError

# Of the MiniCPM4 report: the first activations are ten times as large, and the other positions gain by it. Of
# Llama models SmolLM2 was measured, whose attention sink then has no weight in the error: 0 for them.
P_GPTQ = 4


@dataclass(frozen=True)
class Architecture:
    """One entry of ``architectures`` in config.json.

    Attributes:
        name: short name, as in the manifest.
        config: reads config.json.
        module: holds the torch class ``Model``, imported when a graph is traced.
        skipped: positions at the start of a sequence that calibration leaves out unless told otherwise.

    The published models of each are in ``releases.py``.
    """

    name: str
    config: type[LlamaConfig]
    module: str
    skipped: int = P_GPTQ

    def model_class(self) -> type[Any]:
        return importlib.import_module(self.module).Model  # type: ignore[no-any-return]


_MODELS = "cpm_edge.exporter.models"

ARCHITECTURES = {
    "LlamaForCausalLM": Architecture("llama", LlamaConfig, f"{_MODELS}.llama", skipped=0),
    "MiniCPMForCausalLM": Architecture("minicpm", MiniCPMConfig, f"{_MODELS}.minicpm"),
    "MiniCPM3ForCausalLM": Architecture("minicpm3", MiniCPM3Config, f"{_MODELS}.minicpm3"),
    "MiniCPMSALAForCausalLM": Architecture("minicpm_sala", MiniCPMSALAConfig, f"{_MODELS}.minicpm_sala"),
}

# Architectures that share the name of another one; a key of config.json that is neither 0 nor null tells.
BY_KEY = {
    ("MiniCPMForCausalLM", "num_experts"): Architecture(
        "minicpm_moe", MiniCPMMoEConfig, f"{_MODELS}.minicpm_moe"
    ),
}


def architecture_label(family: str) -> str:
    """How config.json tells the architecture called ``family``: its name, and the key that sets it apart."""
    labels = {entry.name: name for name, entry in ARCHITECTURES.items()}
    labels |= {entry.name: f"{name} with {key}" for (name, key), entry in BY_KEY.items()}
    return labels[family]


def find_architecture(config: Mapping[str, Any]) -> Architecture:
    """The entry for a parsed config.json.

    Raises:
        ConfigError: none of its architectures is known.
    """
    names = config.get("architectures") or []
    for name in names if isinstance(names, list) else [names]:
        if isinstance(name, str) and name in ARCHITECTURES:
            special = (entry for (of, key), entry in BY_KEY.items() if of == name and config.get(key))
            return next(special, ARCHITECTURES[name])
    raise ConfigError(
        f"architectures: expected one of {', '.join(ARCHITECTURES)}, got {names or 'nothing'}",
        hint="cpm-export --list-models shows what is supported",
    )
