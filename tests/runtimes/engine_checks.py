"""What holds for every engine on a real bundle."""

from __future__ import annotations

import builtins
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from cpm_edge.runtimes.bundle import Bundle, hash_files, open_bundle, write_manifest

TOLERANCE = 1e-4


def without_module(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    """Importing ``name`` fails as if it were not installed."""
    original: Callable[..., Any] = builtins.__import__

    def importing(module: str, *arguments: Any, **options: Any) -> Any:
        if module.split(".")[0] == name:
            raise ImportError(f"No module named {name!r}")
        return original(module, *arguments, **options)

    monkeypatch.setattr(builtins, "__import__", importing)


def with_damaged(bundle: Bundle, folder: Path, name: str, content: bytes) -> Bundle:
    """A copy with another file, and a manifest that agrees: only the engine can notice."""
    import dataclasses

    shutil.copytree(bundle.path, folder)
    (folder / name).write_bytes(content)
    write_manifest(folder, dataclasses.replace(bundle.manifest, files=hash_files(folder)))
    return open_bundle(folder)
