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
