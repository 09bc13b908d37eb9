"""Weights split over several files: the index file, and its agreement with what the files hold."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path, PurePosixPath, PureWindowsPath

from cpm_edge.exporter.checkpoint.files import read_json_object
from cpm_edge.exporter.checkpoint.tensors import PlainTensor
from cpm_edge.exporter.errors import CheckpointError


def read_index(path: Path) -> dict[str, str]:
    """Tensor name to shard file name, from ``*.index.json``; every shard exists in the same folder.

    Raises:
        CheckpointError: the index has no weight_map, names a file outside its folder or a missing one.
    """
    weight_map = read_json_object(path).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(f"{path}: expected a non-empty object weight_map")
    for shard in dict.fromkeys(weight_map.values()):
        if not isinstance(shard, str) or not _is_plain_name(shard):
            raise CheckpointError(f"{path}: expected plain file names in weight_map, got {shard!r}")
        if not (path.parent / shard).is_file():
            raise CheckpointError(
                f"{path.name} names the shard {shard}, which is missing in {path.parent}",
                hint="download the missing file; a partial copy of a checkpoint cannot be exported",
            )
    return weight_map


def add_shard(into: dict[str, PlainTensor], shard: Mapping[str, PlainTensor], file_name: str) -> None:
    """Add the tensors of one file.

    Raises:
        CheckpointError: a name was already read from another file.
    """
    for name, tensor in shard.items():
        if name in into:
            raise CheckpointError(f"tensor {name} is in {into[name].file.path.name} and in {file_name}")
        into[name] = tensor


def check_against_index(index: Mapping[str, str], found: Mapping[str, str]) -> None:
    """Check that every tensor of the index is in the file the index says.

    Raises:
        CheckpointError: names the first tensor that is not.
    """
    for name, shard in index.items():
        if found.get(name) != shard:
            place = f"it is in {found[name]}" if name in found else "no file holds it"
            raise CheckpointError(
                f"the index says that tensor {name} is in {shard}; {place}",
                hint="the index and the shards are from different downloads: fetch the checkpoint again",
            )


def _is_plain_name(name: str) -> bool:
    return bool(name) and name == PurePosixPath(name).name == PureWindowsPath(name).name and name != ".."
