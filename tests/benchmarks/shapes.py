"""A shape small enough to export in a test, and a harness for the subcommands."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from click.testing import CliRunner, Result

from cpm_edge.benchmarks.cli import main

TINY: dict[str, Any] = {
    "architectures": ["MiniCPMForCausalLM"],
    "model_type": "minicpm",
    "vocab_size": 320,
    "hidden_size": 128,
    "intermediate_size": 256,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "hidden_act": "silu",
    "rms_norm_eps": 1e-5,
    "max_position_embeddings": 512,
    "tie_word_embeddings": True,
    "scale_emb": 12,
    "scale_depth": 1.4,
    "dim_model_base": 64,
}


def write_shape(folder: Path, config: dict[str, Any] = TINY, **changes: Any) -> Path:
    """A config.json for ``--shape``."""
    path = folder / "tiny.json"
    path.write_text(json.dumps({**config, **changes}), encoding="utf-8")
    return path


def bench(*arguments: object) -> Result:
    """``cpm-bench`` in this process."""
    return CliRunner().invoke(main, [str(argument) for argument in arguments])


def in_this_process(_: object, function: Callable[..., None], *arguments: Any) -> None:
    """Stands in for Artifacts.run: the test has torch imported already."""
    function(*arguments)
