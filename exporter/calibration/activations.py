"""The hidden states of the calibration text between two layers, in a file."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import numpy.typing as npt

BATCH_TOKENS = 2048  # that go through a layer together; bounds the memory of its activations


class Activations:
    """float32 (sequences, length, hidden), read and written in batches of whole sequences.

    Args:
        path: of the file.
        shape: sequences, tokens of each, hidden size.
    """

    def __init__(self, path: Path, shape: tuple[int, int, int]) -> None:
        self.path = path
        self.shape = shape

    def batches(self) -> Iterator[npt.NDArray[np.float32]]:
        """All sequences in order, (some, length, hidden); each array is the caller's own."""
        count, length, hidden = self.shape
        step = max(BATCH_TOKENS // length, 1)
        with self.path.open("rb") as file:
            for start in range(0, count, step):
                rows = min(step, count - start)
                block = np.fromfile(file, np.float32, rows * length * hidden)
                yield block.reshape(rows, length, hidden)

    def write(self, batches: Iterator[npt.NDArray[np.float32]]) -> None:
        """Replace the file as a whole, by the same batches as ``batches`` gives."""
        unfinished = self.path.with_suffix(".partial")
        with unfinished.open("wb") as file:
            for batch in batches:
                np.ascontiguousarray(batch, np.float32).tofile(file)
            file.flush()
            os.fsync(file.fileno())
        unfinished.replace(self.path)
