"""A checkpoint folder: which files hold the weights, and the JSON files beside them."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import NamedTuple

from cpm_edge.exporter.checkpoint.checkpoint import Checkpoint
from cpm_edge.exporter.checkpoint.files import read_json_object
from cpm_edge.exporter.checkpoint.folder_assets import load_folder_assets
from cpm_edge.exporter.checkpoint.gguf_checkpoint import open_gguf
from cpm_edge.exporter.checkpoint.packed_store import CODES, PackedStore
from cpm_edge.exporter.checkpoint.quantization import KEY, Quantization, read_quantization
from cpm_edge.exporter.checkpoint.safetensors_files import open_safetensors
from cpm_edge.exporter.checkpoint.shards import read_index
from cpm_edge.exporter.checkpoint.tensors import PlainStore, TensorStore
from cpm_edge.exporter.checkpoint.torch_files import open_torch
from cpm_edge.exporter.errors import CheckpointError

Opener = Callable[[list[Path], dict[str, str] | None], PlainStore]


class WeightFormat(NamedTuple):
    """One way to store the weights of a folder; ``single`` is the file name without shards."""

    kind: str
    single: str
    suffix: str
    open: Opener


# In order of preference: no pickle is opened where there is a choice.
FORMATS = (
    WeightFormat("safetensors", "model.safetensors", ".safetensors", open_safetensors),
    WeightFormat("torch", "pytorch_model.bin", ".bin", open_torch),
)


def open_folder(folder: Path, name: str) -> Checkpoint:
    """Open the checkpoint in ``folder``; a folder with one GGUF file and no config.json opens that file.

    Raises:
        CheckpointError: config.json or the weights are missing, damaged, or not to be told apart.
        ConfigError: the weights are quantized in a way that is not supported.
    """
    gguf_files = sorted(folder.glob("*.gguf"))
    if gguf_files and not (folder / "config.json").is_file():
        if len(gguf_files) > 1:
            names = ", ".join(path.name for path in gguf_files)
            raise CheckpointError(f"{folder} holds several GGUF files: {names}", hint="pass one of the files")
        return open_gguf(gguf_files[0], name)

    if not (folder / "config.json").is_file():
        raise CheckpointError(
            f"config.json is missing in {folder}",
            hint="expected a folder as on the Hugging Face hub, or a .gguf file",
        )
    config = read_json_object(folder / "config.json")
    generation_path = folder / "generation_config.json"
    generation_config = read_json_object(generation_path) if generation_path.is_file() else {}
    weights, paths, index = find_weights(folder)
    quantization = read_quantization(config, folder)
    return Checkpoint(
        name=name,
        kind=weights.kind,
        # The bundle's weights are not stored as the key says, so its config.json goes without it.
        config={key: value for key, value in config.items() if key != KEY},
        generation_config=generation_config,
        store=_unpacked(weights.open(paths, index), quantization),
        load_assets=partial(load_folder_assets, folder),
        identity=[folder / "config.json"] + ([generation_path] if generation_config else []),
    )


def _unpacked(store: PlainStore, quantization: Quantization | None) -> TensorStore:
    """Packed matrices under their plain names, where there are any."""
    if not any(name.endswith(CODES) for name in store.tensors):
        return store
    try:
        return PackedStore(store, quantization)
    except CheckpointError:
        store.close()
        raise


def find_weights(folder: Path) -> tuple[WeightFormat, list[Path], dict[str, str] | None]:
    """The weight files of ``folder`` and, when they are shards, the index (tensor name to file name).

    Raises:
        CheckpointError: there are none, or several that no index relates.
    """
    for weights in FORMATS:
        if (folder / weights.single).is_file():
            return weights, [folder / weights.single], None
        index_path = folder / f"{weights.single}.index.json"
        if index_path.is_file():
            index = read_index(index_path)
            return weights, [folder / shard for shard in sorted(set(index.values()))], index
    return _lone_safetensors(folder)


def _lone_safetensors(folder: Path) -> tuple[WeightFormat, list[Path], None]:
    """GPTQ tools name their one file after the settings: ``gptq_model-4bit-128g.safetensors``."""
    others = sorted(path for path in folder.glob("*.safetensors") if path.name != "adapter_model.safetensors")
    if len(others) == 1:
        return FORMATS[0], others, None
    if others:
        raise CheckpointError(
            f"{folder} holds {len(others)} safetensors files and no model.safetensors.index.json",
            hint="download the index file; it says which tensor is in which file",
        )
    if (folder / "adapter_model.safetensors").is_file():
        raise CheckpointError(
            f"{folder} holds a LoRA adapter, not a model", hint="merge it into its base model first"
        )
    raise CheckpointError(
        f"{folder} holds no weights: expected model.safetensors, its index, or pytorch_model.bin"
    )
