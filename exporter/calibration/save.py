"""A calibrated model as a Hugging Face checkpoint in the GPTQ or AWQ layout, for other runtimes."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np
import numpy.typing as npt
import torch
from safetensors.torch import save_file

from cpm_edge.exporter.calibration.run import Calibrated
from cpm_edge.exporter.checkpoint.tensors import DTYPES
from cpm_edge.exporter.disk import disk_errors
from cpm_edge.exporter.errors import ExportError
from cpm_edge.exporter.progress import Progress
from cpm_edge.quant import Quantized
from cpm_edge.quant.awq_format import pack_awq
from cpm_edge.quant.gptq_format import pack_gptq, pack_gptq_zeros
from cpm_edge.quant.packed import NIBBLES
from cpm_edge.runtimes.atomic import AtomicFolder

SHARD_BYTES = 1 << 30
AWQ = "awq"

Raw = npt.NDArray[Any]


class Layout(NamedTuple):
    """How the integers of a checkpoint are stored.

    Attributes:
        method: "gptq" or "awq".
        group_size: of most matrices.
        other_groups: group sizes of the others, by module; GPTQ only.
        integers: modules that are quantized.
        floats: modules that are not.
        symmetric: zero point 8 everywhere.
    """

    method: str
    group_size: int
    other_groups: dict[str, int]
    integers: list[str]
    floats: list[str]
    symmetric: bool


def save_checkpoint(calibrated: Calibrated, folder: Path, progress: Progress) -> None:
    """Write the folder whole or not at all.

    Method awq becomes AutoAWQ's GEMM layout, everything else that of GPTQ: its act order keeps groups
    together (static groups), so ``desc_act`` is false. Integers, zero points and scales are those of the
    bundle. Tensors that AWQ scaled are float32, all others keep their type.

    Raises:
        ExportError: the layout has no place for a matrix; says which.
        BundleError: the folder exists.
    """
    layout = _layout(calibrated)
    names = list(calibrated.checkpoint.tensors)
    total = sum(int(np.prod(calibrated.checkpoint.tensors[name].shape)) for name in names)
    output = AtomicFolder(folder)
    with disk_errors(folder), output as partial, progress.weights("Saving the checkpoint", total):
        _write_texts(calibrated, layout, partial)
        _write_weights(_tensors(calibrated, layout, progress), partial)


def _layout(calibrated: Calibrated) -> Layout:
    method = AWQ if calibrated.record["method"] == AWQ else "gptq"
    store, groups, symmetric = calibrated.store, {}, True
    for name in store.packed:
        scheme = store.integers(name).scheme
        rows, _ = store.tensors[name].shape
        if rows % NIBBLES:
            raise ExportError(
                f"--save-checkpoint: {method} packs {NIBBLES} rows, and {name} has {rows}",
                hint="leave --save-checkpoint out",
            )
        assert scheme.group_size is not None
        groups[name.removesuffix(".weight")] = scheme.group_size
        symmetric = symmetric and scheme.symmetric
    if not groups:
        raise ExportError("--save-checkpoint: no matrix is int4", hint="choose a higher --ratio")
    sizes = list(groups.values())
    usual = max(set(sizes), key=lambda size: (sizes.count(size), size))
    others = {module: size for module, size in groups.items() if size != usual}
    if others and method == AWQ:
        module, size = next(iter(others.items()))
        raise ExportError(
            f"--save-checkpoint: AWQ has one group size for all, and {module} has {size} instead of {usual}",
            hint=f"choose --group-size {min(sizes)}, or --method gptq+awq, whose layout can tell them apart",
        )
    matrices = [
        name.removesuffix(".weight")
        for name, info in store.tensors.items()
        if ".layers." in name and name.endswith(".weight") and len(info.shape) == 2
    ]
    floats = [module for module in matrices if module not in groups]
    return Layout(method, usual, others, list(groups), floats, symmetric)


def _quantization(layout: Layout, record: dict[str, Any]) -> dict[str, Any]:
    """``quantization_config`` of config.json.

    Which modules stay floats is said once for each reader: gptqmodel looks at ``dynamic`` alone, transformers
    and vLLM at ``modules_in_block_to_quantize`` for GPTQ and ``modules_to_not_convert`` for AWQ. A reader
    that misses it makes integers of memory that no file fills.
    """
    dynamic: dict[str, Any] = {f"-:^{_pattern(module)}$": {} for module in layout.floats}
    if layout.method == AWQ:
        return {
            "quant_method": "awq",
            "bits": 4,
            "group_size": layout.group_size,
            "version": "gemm",
            "zero_point": True,
            "modules_to_not_convert": layout.floats or None,
            **({"dynamic": dynamic} if dynamic else {}),
        }
    dynamic |= {f"+:^{_pattern(m)}$": {"group_size": size} for m, size in layout.other_groups.items()}
    return {
        "quant_method": "gptq",
        "bits": 4,
        "group_size": layout.group_size,
        "sym": layout.symmetric,
        "desc_act": False,
        "static_groups": True,
        "checkpoint_format": "gptq" if layout.symmetric else "gptq_v2",
        "damp_percent": record["damping"],
        "true_sequential": False,
        "lm_head": False,
        **({"modules_in_block_to_quantize": [layout.integers]} if layout.floats else {}),
        **({"dynamic": dynamic} if dynamic else {}),
    }


def _pattern(module: str) -> str:
    return module.replace(".", r"\.")


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
    quantization = _quantization(layout, calibrated.record)
    config = {**checkpoint.config, "quantization_config": quantization}
    _write_json(folder / "config.json", config)
    if checkpoint.generation_config:
        _write_json(folder / "generation_config.json", checkpoint.generation_config)
    _write_json(folder / "calibration.json", calibrated.record)


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
