"""A calibrated model as a Hugging Face checkpoint in the GPTQ or AWQ layout, for other runtimes."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import numpy.typing as npt
import torch
from safetensors.torch import save_file

from cpm_edge.exporter.calibration.layout import AWQ, Layout, choose_layout
from cpm_edge.exporter.calibration.run import Calibrated
from cpm_edge.exporter.checkpoint.tensors import DTYPES
from cpm_edge.exporter.disk import disk_errors
from cpm_edge.exporter.errors import ExportError
from cpm_edge.exporter.progress import Progress
from cpm_edge.quant import Quantized
from cpm_edge.quant.awq_format import pack_awq
from cpm_edge.quant.gptq_format import pack_gptq, pack_gptq_zeros
from cpm_edge.runtimes.atomic import AtomicFolder

SHARD_BYTES = 1 << 30
RECORD = "calibration.json"
OPTION = "--save-checkpoint"

Raw = npt.NDArray[Any]


def output_of(folder: Path, overwrite: bool) -> AtomicFolder:
    """The folder of a saved checkpoint; only one that was saved before is replaced.

    Raises:
        ExportError: it lies in a folder that cannot be written.
    """
    parent = next(each for each in folder.resolve().parents if each.exists())
    if not parent.is_dir() or not os.access(parent, os.W_OK):
        raise ExportError(f"{OPTION} {folder}: {parent} is no folder that can be written to")
    return AtomicFolder(folder, overwrite, option=OPTION, marker=RECORD)


def save_checkpoint(
    calibrated: Calibrated, folder: Path, progress: Progress, overwrite: bool = False
) -> None:
    """Write the folder whole or not at all.

    Method awq becomes AutoAWQ's GEMM layout, everything else that of GPTQ: its act order keeps groups
    together (static groups), so ``desc_act`` is false. Integers, zero points and scales are those of the
    bundle. Tensors that AWQ scaled are float32, all others keep their type.

    Raises:
        ExportError: the layout has no place for a matrix; says which.
        BundleError: the folder exists, and is no saved checkpoint that ``overwrite`` replaces.
    """
    store = calibrated.store
    shapes = {name: info.shape for name, info in store.tensors.items()}
    layout = choose_layout(calibrated.record["method"], store.schemes, shapes)
    names = list(calibrated.checkpoint.tensors)
    total = sum(int(np.prod(calibrated.checkpoint.tensors[name].shape)) for name in names)
    with (
        disk_errors(folder, OPTION, "the calibration is kept for the next run"),
        output_of(folder, overwrite) as partial,
        progress.weights("Saving the checkpoint", total),
    ):
        _write_texts(calibrated, layout, partial)
        _write_weights(_tensors(calibrated, layout, progress), partial)


def _tensors(calibrated: Calibrated, layout: Layout, progress: Progress) -> Iterator[tuple[str, Raw]]:
    """The stored tensors, in the order of the source."""
    checkpoint, store = calibrated.checkpoint, calibrated.store
    for name, info in checkpoint.tensors.items():
        module = name.removesuffix(".weight")
        if name in store.packed:
            matrix = store.integers(name).block(0, info.shape[0])()
            pack = _awq_parts if layout.method == AWQ else _gptq_parts
            yield from ((f"{module}.{part}", tensor) for part, tensor in pack(matrix, layout).items())
        elif name in store.scaled or info.dtype not in DTYPES:
            yield name, checkpoint.read(name)
        else:
            yield name, checkpoint.read_raw(name)
        progress.advance(int(np.prod(info.shape)))


def _gptq_parts(matrix: Quantized, layout: Layout) -> dict[str, Raw]:
    columns = np.arange(matrix.codes.shape[1], dtype=np.int32)
    return {
        "qweight": pack_gptq(matrix.codes),
        "qzeros": pack_gptq_zeros(matrix.zero_points(), less_one=layout.symmetric),
        "scales": np.ascontiguousarray(matrix.scales.T).astype(np.float16),
        "g_idx": columns // np.int32(matrix.group_width),
    }


def _awq_parts(matrix: Quantized, layout: Layout) -> dict[str, Raw]:
    return {
        "qweight": pack_awq(matrix.codes),
        "qzeros": pack_awq(matrix.zero_points()),
        "scales": np.ascontiguousarray(matrix.scales.T).astype(np.float16),
    }


def _write_texts(calibrated: Calibrated, layout: Layout, folder: Path) -> None:
    checkpoint = calibrated.checkpoint
    for name, content in checkpoint.assets().items():
        if isinstance(content, bytes):
            (folder / name).write_bytes(content)
        else:
            shutil.copyfile(content, folder / name)
    quantization = layout.quantization_config(calibrated.record["damping"])
    config = {**checkpoint.config, "quantization_config": quantization}
    _write_json(folder / "config.json", config)
    if checkpoint.generation_config:
        _write_json(folder / "generation_config.json", checkpoint.generation_config)
    _write_json(folder / RECORD, calibrated.record)


def _write_json(path: Path, value: dict[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def _write_weights(tensors: Iterator[tuple[str, Raw]], folder: Path) -> None:
    """Shards of about SHARD_BYTES with their index, beside a config.json."""
    index: dict[str, str] = {}
    shard: dict[str, Raw] = {}
    number = size = total = 0

    def close() -> None:
        nonlocal number, size
        number, size = number + 1, 0
        file = f"model-{number:05}.safetensors"
        save_file({name: _torch(part) for name, part in shard.items()}, folder / file, {"format": "pt"})
        shutil.copymode(folder / "config.json", folder / file)  # save_file lets nobody else read it
        index.update(dict.fromkeys(shard, file))
        shard.clear()

    for name, tensor in tensors:
        shard[name] = tensor
        size += tensor.nbytes
        total += tensor.nbytes
        if size >= SHARD_BYTES:
            close()
    if shard:
        close()
    _write_json(
        folder / "model.safetensors.index.json", {"metadata": {"total_size": total}, "weight_map": index}
    )


def _torch(tensor: Raw) -> torch.Tensor:
    """The same memory as a torch tensor; numpy's bfloat16 is not one of numpy's own types."""
    if tensor.dtype == ml_dtypes.bfloat16:
        return torch.from_numpy(tensor.view(np.int16)).view(torch.bfloat16)
    return torch.from_numpy(tensor)
