"""Refuses paths of peers that cannot be used, before minutes of exports."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

from cpm_edge.benchmarks.errors import BenchError


def check_program(option: str, path: Path | None) -> None:
    """Refuse a program that was given and cannot be started; None is one that was not given.

    Raises:
        BenchError: there is no such file, or it is a folder or not executable.
    """
    if path is None or (path.is_file() and os.access(path, os.X_OK)):
        return
    if path.is_dir():
        fault, hint = "which is a folder", "give the path of the program in it"
    elif path.exists():
        fault, hint = "which is not executable", "if it is the right file, make it executable with chmod +x"
    else:
        found = shutil.which(path.name)
        fault = "which does not exist"
        hint = (
            f"did you mean {found}?" if found else "check the path, or leave the option out to skip that peer"
        )
    raise BenchError(f"{option}: expected a program, got {path}, {fault}", hint=hint)


def check_model_folder(option: str, folder: Path | None, file: str) -> None:
    """Refuse a model's folder that was given and does not hold ``file``; None is one that was not given.

    Raises:
        BenchError: there is no such folder, or the file is not in it.
    """
    if folder is None or (folder / file).is_file():
        return
    fault = f"which has no {file}" if folder.is_dir() else "which is no folder"
    raise BenchError(
        f"{option}: expected a folder with {file}, got {folder}, {fault}",
        hint="check the path, or leave the option out to skip that peer",
    )
