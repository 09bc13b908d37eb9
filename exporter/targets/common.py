"""What every target gets and gives back."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import onnx_ir as ir

from cpm_edge.exporter.checkpoint import Checkpoint
from cpm_edge.exporter.configs import LlamaConfig
from cpm_edge.exporter.weights import ModelWeights
from cpm_edge.runtimes.cache_layout import STATE


@dataclass(frozen=True)
class BuildJob:
    """One graph to lower into ``folder``.

    Attributes:
        model: traced graph; the target may change it.
        weights: checked against the graph.
        kv_cache: "fp32", "fp16" or "int8"; None lets the target choose.
        activations: "fp32", or "int8" to quantize the inputs of integer linear layers at run time; None lets
            the target choose.
        flavour: "stock" or "native", for target aipc.
        max_context: tokens the bundle is made for.
        progress: called with the number of weight elements written.
    """

    model: ir.Model
    config: LlamaConfig
    checkpoint: Checkpoint
    weights: ModelWeights
    folder: Path
    max_context: int
    kv_cache: str | None
    activations: str | None
    flavour: str
    progress: Callable[[int], None]


@dataclass(frozen=True)
class Built:
    """A target's part of the manifest."""

    engine: dict[str, Any]
    cache: dict[str, Any]
    activations: str
    ops: list[dict[str, Any]]
    flavour: str | None = None


def cache_layers(config: LlamaConfig) -> dict[str, Any]:
    """Which layers keep what: the part of the manifest's ``cache`` that all targets share."""
    described: dict[str, Any] = {
        "layers": config.num_hidden_layers,
        "kv_heads": config.num_key_value_heads,
        "head_dim": config.head_dim,
    }
    states = {
        layer: caches[STATE]
        for layer in range(config.num_hidden_layers)
        if STATE in (caches := config.layer_caches(layer))
    }
    if states:
        heads, key_size, value_size = next(iter(states.values()))
        sizes = {"heads": heads, "key_size": key_size, "value_size": value_size}
        described["recurrent"] = {"layers": list(states), "dtype": "float32", **sizes}
    return described
