"""A GGUF file opened as a Hugging Face checkpoint."""

from __future__ import annotations

from contextlib import ExitStack
from functools import partial
from pathlib import Path

from gguf.quants import dequantize

from cpm_edge.exporter.checkpoint.checkpoint import Checkpoint
from cpm_edge.exporter.checkpoint.files import PositionalFile
from cpm_edge.exporter.checkpoint.gguf_assets import load_gguf_assets
from cpm_edge.exporter.checkpoint.gguf_config import (
    Metadata,
    build_config,
    build_generation_config,
    check_architecture,
)
from cpm_edge.exporter.checkpoint.gguf_header import GgufHeader, read_gguf_header
from cpm_edge.exporter.checkpoint.gguf_names import ROPE_FREQS, ROPE_LONG, ROPE_SHORT, hf_names
from cpm_edge.exporter.checkpoint.gguf_store import GgufStore
from cpm_edge.exporter.errors import CheckpointError


def open_gguf(path: Path, name: str) -> Checkpoint:
    """Open a GGUF file of architecture llama, minicpm or minicpm3; its header is read, its weights are not.

    Raises:
        CheckpointError: not GGUF, truncated, another architecture, or a type that cannot be dequantized.
    """
    with ExitStack() as on_failure:
        file = PositionalFile(path)
        on_failure.callback(file.close)
        header = read_gguf_header(file)
        try:
            architecture = check_architecture(Metadata(header.metadata))
            names = hf_names(header.tensors, architecture)
            weights = {hf: header.tensors[gguf] for hf, gguf in names.items()}
            shapes = {hf: tensor.shape for hf, tensor in weights.items()}
            config = build_config(header.metadata, shapes, _rope_factors(file, header))
            store = GgufStore(
                file,
                weights,
                heads=config["num_attention_heads"],
                kv_heads=config["num_key_value_heads"],
                head_dim=config["head_dim"],
            )
        except CheckpointError as error:
            raise CheckpointError(f"{path}: {error.message}", hint=error.hint) from error
        on_failure.pop_all()
    generation_config = build_generation_config(header.metadata)
    return Checkpoint(
        name=name,
        kind="gguf",
        config=config,
        generation_config=generation_config,
        store=store,
        load_assets=partial(load_gguf_assets, path, header.metadata, generation_config),
        identity=[],
    )


def _rope_factors(file: PositionalFile, header: GgufHeader) -> dict[str, list[float]]:
    """Contents of the rope tensors; float32 written as the shortest equal decimals."""
    factors = {}
    for key, name in (("long", ROPE_LONG), ("short", ROPE_SHORT), ("freqs", ROPE_FREQS)):
        if (tensor := header.tensors.get(name)) is not None:
            values = dequantize(file.read(tensor.offset, tensor.row_bytes).reshape(1, -1), tensor.type)
            factors[key] = [float(str(value)) for value in values.reshape(-1)]
    return factors
