"""What every target gets and gives back."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir

from cpm_edge.exporter.checkpoint import Checkpoint
from cpm_edge.exporter.configs import LlamaConfig, MiniCPM3Config
from cpm_edge.exporter.configs.llama import CAPACITY, CacheShape
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
        flavour: "stock" or "native", where the target has both.
        target: which of the targets that share a module.
        chip: an id of benchmarks.plan, where the target asks for one.
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
    target: str
    chip: str | None
    progress: Callable[[int], None]


@dataclass(frozen=True)
class Built:
    """A target's part of the manifest."""

    engine: dict[str, Any]
    cache: dict[str, Any]
    activations: str
    ops: list[dict[str, Any]]
    flavour: str | None = None


def cache_layers(config: LlamaConfig, dtype: str) -> dict[str, Any]:
    """Which layers keep what: the part of the manifest's ``cache`` that all targets share.

    Args:
        dtype: of cached rows, a numpy name; states are float32.
    """
    caches = [config.layer_caches(layer) for layer in range(config.num_hidden_layers)]
    ports = next(ports for ports in caches if "key" in ports)
    heads, _, size = ports["key"]
    item = np.dtype(dtype).itemsize
    described: dict[str, Any] = {
        "dtype": dtype,
        "layers": config.num_hidden_layers,
        "ports": list(ports),
        "kv_heads": heads,
        "head_dim": size,
        "token_bytes": item * sum(_row_size(shape) for ports in caches for shape in ports.values()),
    }
    if isinstance(config, MiniCPM3Config):
        described["expanded_token_bytes"] = item * config.num_hidden_layers * config.expanded_size
    states = {layer: ports[STATE] for layer, ports in enumerate(caches) if STATE in ports}
    if states:
        heads, key_size, value_size = next(iter(states.values()))
        sizes = {"heads": heads, "key_size": key_size, "value_size": value_size}
        described["recurrent"] = {"layers": list(states), "dtype": "float32", **sizes}
    return described


def _row_size(shape: CacheShape) -> int:
    """Values a token in a cache of this shape; 0 where the cache does not grow."""
    if CAPACITY not in shape:
        return 0
    return math.prod(int(size) for size in shape if size != CAPACITY)
