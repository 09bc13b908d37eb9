"""PyTorch ``.bin`` files: unpickled with weights_only, rows read at their file offsets.

Loading under fake tensors gives every storage's offset in the file without reading it, so rows come
from positional reads, as for safetensors: ``torch.load(mmap=True)`` would keep the pages it touched.
See "torch.load under FakeTensorMode" in PyTorch's serialization notes.
"""

from __future__ import annotations

import pickle
import zipfile
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cpm_edge.exporter.checkpoint.files import PositionalFile
from cpm_edge.exporter.checkpoint.shards import add_shard, check_against_index
from cpm_edge.exporter.checkpoint.tensors import DTYPES, PlainStore, PlainTensor, TensorInfo
from cpm_edge.exporter.errors import CheckpointError

if TYPE_CHECKING:
    import torch

CONVERT_HINT = "use the checkpoint's safetensors files, or convert it on a machine that trusts its author"
DTYPE_NAMES = {
    "float32": "F32",
    "float16": "F16",
    "bfloat16": "BF16",
    "float64": "F64",
    "int8": "I8",
    "uint8": "U8",
    "int16": "I16",
    "int32": "I32",
    "int64": "I64",
    "bool": "BOOL",
    "float8_e4m3fn": "F8_E4M3",
    "float8_e5m2": "F8_E5M2",
}


def open_torch(paths: list[Path], index: dict[str, str] | None) -> PlainStore:
    """All tensors of the given files; arguments as in ``open_safetensors``.

    Raises:
        CheckpointError: a file holds more than tensors, is damaged, or disagrees with the index.
    """
    tensors: dict[str, PlainTensor] = {}
    with ExitStack() as on_failure:
        files = []
        for path in paths:
            file = PositionalFile(path)
            on_failure.callback(file.close)
            state = _load_fake(path)
            add_shard(tensors, {name: _locate(name, value, file) for name, value in state.items()}, path.name)
            files.append(file)
        if index is not None:
            check_against_index(index, {name: tensor.file.path.name for name, tensor in tensors.items()})
        on_failure.pop_all()
    return PlainStore(tensors, files)


def _load_fake(path: Path) -> dict[str, torch.Tensor]:
    """The state dict with fake tensors: shapes, types and storage offsets, no data."""
    _check_archive(path)
    try:
        import torch
        from torch._subclasses.fake_tensor import FakeTensorMode
    except ImportError as error:
        raise CheckpointError(
            f"{path}: reading PyTorch files needs the package torch", hint='pip install "cpm-edge[export]"'
        ) from error
    try:
        with FakeTensorMode():
            state: Any = torch.load(path, weights_only=True, map_location="cpu")
    except pickle.UnpicklingError as error:
        raise CheckpointError(
            f"{path}: holds Python objects other than tensors; loading it could run code: "
            f"{str(error).splitlines()[0]}",
            hint=CONVERT_HINT,
        ) from error
    except (RuntimeError, EOFError, KeyError, ValueError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{path}: not a readable PyTorch file: {error}", hint=CONVERT_HINT) from error
    if isinstance(state, dict) and isinstance(state.get("state_dict"), dict):
        state = state["state_dict"]
    if not isinstance(state, dict) or not all(isinstance(value, torch.Tensor) for value in state.values()):
        raise CheckpointError(f"{path}: expected a dictionary of tensors", hint=CONVERT_HINT)
    return {str(name): value for name, value in state.items()}


def _check_archive(path: Path) -> None:
    """Refuse truncated files, the format before PyTorch 1.6, and big-endian data."""
    try:
        with zipfile.ZipFile(path) as archive:
            members = {name.split("/", 1)[-1]: name for name in archive.namelist()}
            order = archive.read(members["byteorder"]) if "byteorder" in members else b"little"
    except (zipfile.BadZipFile, OSError) as error:
        raise CheckpointError(
            f"{path}: not a whole file of PyTorch 1.6 or later ({path.stat().st_size} bytes): {error}",
            hint="download it again, or save it again with a recent torch.save",
        ) from error
    if order != b"little":
        raise CheckpointError(f"{path}: expected little-endian data, got {order!r}", hint=CONVERT_HINT)


def _locate(name: str, tensor: torch.Tensor, file: PositionalFile) -> PlainTensor:
    dtype = DTYPE_NAMES.get(str(tensor.dtype).removeprefix("torch."))
    if dtype is None:
        raise CheckpointError(
            f"{file.path}: {name}: type {tensor.dtype} is not supported ({', '.join(DTYPE_NAMES)} are)",
            hint="export the fp32, fp16 or bf16 checkpoint of the model",
        )
    storage = tensor.untyped_storage()
    offset = getattr(storage, "_checkpoint_offset", None)
    if offset is None or not tensor.is_contiguous():
        raise CheckpointError(f"{file.path}: {name}: expected a row-major tensor", hint=CONVERT_HINT)
    start = offset + tensor.storage_offset() * DTYPES[dtype].itemsize
    end = start + tensor.numel() * DTYPES[dtype].itemsize
    if end > file.size:
        raise CheckpointError(f"{file.path}: {name} ends at byte {end}, the file has {file.size}")
    return PlainTensor(TensorInfo(name, tuple(tensor.shape), dtype), file, start)
