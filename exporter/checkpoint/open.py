"""From what the user typed to an opened checkpoint."""

from __future__ import annotations

import re
from pathlib import Path

from cpm_edge.exporter.checkpoint.checkpoint import Checkpoint
from cpm_edge.exporter.checkpoint.folder import open_folder
from cpm_edge.exporter.checkpoint.gguf_checkpoint import open_gguf
from cpm_edge.exporter.checkpoint.hub import download
from cpm_edge.exporter.errors import CheckpointError

HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")


def open_checkpoint(ref: str, *, revision: str | None = None) -> Checkpoint:
    """Open a checkpoint without reading its weights.

    Args:
        ref: a folder, a ``.gguf`` file, or a Hugging Face id ``org/name``; a path that exists wins.
        revision: branch, tag or commit of a Hugging Face id; refused for local files.

    Raises:
        CheckpointError: nothing there, files missing, damaged or of an unknown kind, or the download
            failed; the hint says what to do.
    """
    path = Path(ref).expanduser()
    if ref and path.exists():
        if revision is not None:
            raise CheckpointError(
                f"--revision {revision}: only a Hugging Face id has revisions, {ref} is local",
                hint="leave --revision out",
            )
        return _open_local(path)
    if ref.endswith(".gguf") or not HUB_ID.fullmatch(ref):
        raise CheckpointError(
            f"{ref}: no such file or folder, and not a Hugging Face id",
            hint="expected a checkpoint folder, a .gguf file, or an id like openbmb/MiniCPM4-0.5B",
        )
    return open_folder(download(ref, revision), ref)


def _open_local(path: Path) -> Checkpoint:
    if path.is_dir():
        return open_folder(path, path.resolve().name)
    if path.suffix.lower() == ".gguf":
        return open_gguf(path, path.stem)
    raise CheckpointError(
        f"{path}: expected a checkpoint folder or a .gguf file", hint="pass the folder that holds config.json"
    )
