"""Failures of the output disk, as one error that says which file and what to do."""

from __future__ import annotations

import contextlib
import errno
from collections.abc import Iterator
from pathlib import Path

from cpm_edge.exporter.errors import ExportError

_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_MORE_SPACE = "free some space or choose another {option}; {left}"
_LEFT = "nothing was left behind"


@contextlib.contextmanager
def disk_errors(path: Path, option: str = "-o", left: str = _LEFT) -> Iterator[None]:
    """Turn an OSError into an ExportError that names ``path``.

    Args:
        option: that chose the path, for the hint.
        left: what there is afterwards.

    Raises:
        ExportError: the disk is full, or the file cannot be written for another reason.
    """
    try:
        yield
    except BrokenPipeError:  # somebody closed our output, not the disk
        raise
    except OSError as error:
        if error.errno in _FULL:
            hint = _MORE_SPACE.format(option=option, left=left)
            raise ExportError(f"cannot write {path.name}: the disk is full", hint=hint) from error
        # str() would name the file once more, by its place in the temporary folder.
        raise ExportError(
            f"cannot write {path}: {error.strerror or error}",
            hint=f"check the permissions there, or choose another {option}; {left}",
        ) from error


@contextlib.contextmanager
def openvino_disk_errors(path: Path) -> Iterator[None]:
    """The same for files that OpenVINO writes: its C++ streams know that they failed, but not why.

    Raises:
        ExportError: the file could not be written.
    """
    try:
        yield
    except RuntimeError as error:
        if not any(text in str(error) for text in ("iostream", "Can't open")):
            raise
        raise ExportError(
            f"cannot write {path.name}: the disk is full or has failed",
            hint=_MORE_SPACE.format(option="-o", left=_LEFT),
        ) from error
