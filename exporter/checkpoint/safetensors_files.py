"""safetensors files: the header checked before any use, rows read at their offsets.

The safetensors library maps whole files, whose pages then stay resident, and gives no data offsets.
Format: u64 little-endian header length, JSON header, data (https://github.com/huggingface/safetensors).
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from cpm_edge.exporter.checkpoint.files import PositionalFile
from cpm_edge.exporter.checkpoint.shards import add_shard, check_against_index
from cpm_edge.exporter.checkpoint.tensors import DTYPES, PlainStore, PlainTensor, TensorInfo
from cpm_edge.exporter.errors import CheckpointError

MAX_HEADER_BYTES = 100_000_000  # the limit of the reference implementation
LENGTH_BYTES = 8


def open_safetensors(paths: list[Path], index: dict[str, str] | None) -> PlainStore:
    """All tensors of the given files.

    Args:
        paths: the files, in the order of their names.
        index: tensor name to file name from model.safetensors.index.json, None for a single file.

    Raises:
        CheckpointError: a file is damaged or truncated, or the files and the index disagree.
    """
    tensors: dict[str, PlainTensor] = {}
    with ExitStack() as on_failure:
        files = []
        for path in paths:
            file = PositionalFile(path)
            on_failure.callback(file.close)
            add_shard(tensors, read_header(file), path.name)
            files.append(file)
        if index is not None:
            check_against_index(index, {name: tensor.file.path.name for name, tensor in tensors.items()})
        on_failure.pop_all()
    return PlainStore(tensors, files)


def read_header(file: PositionalFile) -> dict[str, PlainTensor]:
    """The tensors of one file, checked: known types, sizes that fit, data that tiles the file exactly.

    Raises:
        CheckpointError: what is wrong, with the tensor's name, expected and found.
    """
    header, data_start = _parse_header(file)
    spans = sorted(_spans(file.path, header))
    position = 0
    for begin, end, name, _ in spans:
        if begin != position:
            what = "overlaps" if begin < position else "leaves a hole after"
            raise CheckpointError(
                f"{file.path}: {name} at data bytes [{begin}, {end}) {what} the tensor ending at {position}"
            )
        position = end
    if data_start + position != file.size:
        raise CheckpointError(
            f"{file.path}: expected {data_start + position} bytes, got {file.size}",
            hint="the file is truncated or damaged: copy or download it again",
        )
    return {name: PlainTensor(info, file, data_start + begin) for begin, _, name, info in spans}


def _parse_header(file: PositionalFile) -> tuple[dict[str, Any], int]:
    if file.size < LENGTH_BYTES:
        raise CheckpointError(f"{file.path}: not a safetensors file: it has {file.size} bytes")
    length = int.from_bytes(file.read(0, LENGTH_BYTES).tobytes(), "little")
    if length > MAX_HEADER_BYTES:
        raise CheckpointError(
            f"{file.path}: not a safetensors file: header of {length} bytes, at most {MAX_HEADER_BYTES}"
        )
    if LENGTH_BYTES + length > file.size:
        raise CheckpointError(
            f"{file.path}: expected at least {LENGTH_BYTES + length} bytes, got {file.size}",
            hint="the file is truncated: copy or download it again",
        )
    try:
        header = json.loads(file.read(LENGTH_BYTES, length).tobytes(), object_pairs_hook=_unique_keys)
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{file.path}: the safetensors header is not JSON: {error}") from error
    if not isinstance(header, dict):
        raise CheckpointError(f"{file.path}: the safetensors header is not a JSON object")
    return header, LENGTH_BYTES + length


def _unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    mapping = dict(pairs)
    if len(mapping) != len(pairs):
        raise ValueError("a name occurs twice")
    return mapping


def _spans(path: Path, header: dict[str, Any]) -> Iterator[tuple[int, int, str, TensorInfo]]:
    """``(begin, end, name, info)`` of every entry, sizes checked."""
    for name, entry in header.items():
        if name == "__metadata__":
            continue
        info, begin, end = _entry(path, name, entry)
        expected = math.prod(info.shape) * DTYPES[info.dtype].itemsize
        if end - begin != expected:
            raise CheckpointError(
                f"{path}: {name} {info.dtype} {[*info.shape]}: expected {expected} bytes, got {end - begin}"
            )
        yield begin, end, name, info


def _entry(path: Path, name: str, entry: Any) -> tuple[TensorInfo, int, int]:
    if not isinstance(entry, dict):
        raise CheckpointError(f"{path}: {name}: expected an object in the header")
    dtype, shape, offsets = entry.get("dtype"), entry.get("shape"), entry.get("data_offsets")
    if not isinstance(dtype, str) or dtype not in DTYPES:
        raise CheckpointError(
            f"{path}: {name}: dtype {dtype!r} is not supported ({', '.join(DTYPES)} are)",
            hint="export the fp32, fp16 or bf16 checkpoint of the model",
        )
    if shape is None or not _is_sizes(shape):
        raise CheckpointError(f"{path}: {name}: expected a list of sizes as shape, got {shape!r}")
    if offsets is None or not _is_sizes(offsets) or len(offsets) != 2 or offsets[0] > offsets[1]:
        raise CheckpointError(f"{path}: {name}: expected data_offsets [begin, end], got {offsets!r}")
    return TensorInfo(name, tuple(shape), dtype), offsets[0], offsets[1]


def _is_sizes(value: Any) -> bool:
    return isinstance(value, list) and all(type(item) is int and item >= 0 for item in value)
