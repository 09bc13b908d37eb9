"""Positional reads from big files, and small JSON files read with clear errors."""

from __future__ import annotations

import hashlib
import json
import os
import threading
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from cpm_edge.exporter.errors import CheckpointError

FINGERPRINT_WINDOW = 1 << 20  # bytes hashed at either end of a file
MAX_JSON_BYTES = 200_000_000  # the largest tokenizer.json or index in use is about 40 MB


class PositionalFile:
    """A file read at absolute offsets, from any thread, without mapping it.

    Mapped pages count as resident memory until the kernel needs them elsewhere; a read into an owned
    buffer costs that buffer and nothing more.
    """

    def __init__(self, path: Path) -> None:
        try:
            self._handle = path.open("rb", buffering=0)
        except OSError as error:
            raise CheckpointError(f"{path}: cannot be opened: {error.strerror}") from error
        self.path = path
        self.size = os.fstat(self._handle.fileno()).st_size
        self._lock = threading.Lock()

    def read(self, offset: int, nbytes: int) -> npt.NDArray[np.uint8]:
        """Bytes ``[offset, offset + nbytes)`` as a new uint8 array.

        Raises:
            CheckpointError: the file ends before that, or the disk reports an error.
        """
        if offset < 0 or nbytes < 0 or offset + nbytes > self.size:
            raise CheckpointError(
                f"{self.path}: expected {nbytes} bytes at offset {offset}, the file has {self.size} bytes",
                hint="the file is truncated: copy or download it again",
            )
        buffer = np.empty(nbytes, dtype=np.uint8)
        view = buffer.data
        done = 0
        while done < nbytes:
            try:
                count = self._read_into(view[done:], offset + done)
            except OSError as error:
                raise CheckpointError(f"{self.path}: read error at {offset + done}: {error}") from error
            if count == 0:
                raise CheckpointError(f"{self.path}: ended at {offset + done} while it was being read")
            done += count
        return buffer

    def read_strided(self, offset: int, nbytes: int, stride: int, count: int) -> npt.NDArray[np.uint8]:
        """``count`` runs of ``nbytes`` whose starts are ``stride`` apart, as uint8 (count, nbytes).

        Raises:
            CheckpointError: as ``read``.
        """
        if nbytes == stride:
            return self.read(offset, nbytes * count).reshape(count, nbytes)
        result = np.empty((count, nbytes), dtype=np.uint8)
        for index in range(count):
            result[index] = self.read(offset + index * stride, nbytes)
        return result

    def _read_into(self, view: memoryview, offset: int) -> int:
        if hasattr(os, "preadv"):
            return os.preadv(self._handle.fileno(), [view], offset)
        with self._lock:  # Windows and macOS before 11 have no positional scatter read
            self._handle.seek(offset)
            return self._handle.readinto(view) or 0

    def close(self) -> None:
        """Close the file; a second call does nothing."""
        self._handle.close()


def read_json_object(path: Path) -> dict[str, Any]:
    """The JSON object in ``path``.

    Raises:
        CheckpointError: the file is missing, unreadable, not JSON, or not an object.
    """
    try:
        if path.stat().st_size > MAX_JSON_BYTES:
            raise CheckpointError(f"{path}: expected a JSON file below {MAX_JSON_BYTES} bytes")
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError as error:
        raise CheckpointError(f"{path.name} is missing in {path.parent}") from error
    except (OSError, UnicodeDecodeError) as error:
        raise CheckpointError(f"{path}: cannot be read: {error}") from error
    try:
        value = json.loads(text)
    except (json.JSONDecodeError, RecursionError) as error:
        raise CheckpointError(f"{path}: not valid JSON: {error}") from error
    if not isinstance(value, dict):
        raise CheckpointError(f"{path}: expected a JSON object, got {type(value).__name__}")
    return value


def fingerprint_file(path: Path) -> dict[str, Any]:
    """``{"bytes": size, "sha256_head": hex}``: the hash covers the size and both ends of the file.

    A file of up to 2 MiB is covered whole; a bigger one by its first and last MiB, so that a
    checkpoint of any size is identified in milliseconds.
    """
    with path.open("rb") as handle:
        size = os.fstat(handle.fileno()).st_size
        digest = hashlib.sha256(str(size).encode())
        if size <= 2 * FINGERPRINT_WINDOW:
            digest.update(handle.read())
        else:
            digest.update(handle.read(FINGERPRINT_WINDOW))
            handle.seek(-FINGERPRINT_WINDOW, os.SEEK_END)
            digest.update(handle.read())
    return {"bytes": size, "sha256_head": digest.hexdigest()}
