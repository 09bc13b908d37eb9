"""NNCF's ``compress_weights`` on a bundle's IR, in a venv of its own."""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from cpm_edge.benchmarks.errors import BenchError

CHILD = Path(__file__).with_name("nncf_child.py")
MODEL = "openvino_model.xml"


@dataclass(frozen=True)
class NncfPeer:
    """What NNCF compresses, and the Python that does it.

    Args:
        python: of a venv that has nncf and openvino.
        bundle: aipc, stock, with float32 weights.
        windows: int64 (windows, T), what is scored.
        folder: for files between the two processes.
    """

    python: Path
    bundle: Path
    windows: npt.NDArray[np.int64]
    folder: Path

    def logits(
        self, group_size: int, sequences: npt.NDArray[np.int64] | None
    ) -> tuple[str, Iterator[npt.NDArray[np.float32]]]:
        """NNCF's version, and the logits (T, vocab) of all windows.

        Args:
            sequences: int64 (sequences, T), what it calibrates on; None rounds to nearest.

        Raises:
            BenchError: the child failed; ends with what it printed last.
        """
        self.folder.mkdir(exist_ok=True)
        np.save(self.folder / "windows.npy", self.windows)
        if sequences is not None:
            np.save(self.folder / "sequences.npy", sequences)
        settings = {
            "model": str(self.bundle / MODEL),
            "windows": str(self.folder / "windows.npy"),
            "sequences": str(self.folder / "sequences.npy") if sequences is not None else None,
            "group_size": group_size,
            "output": str(self.folder),
        }
        answer = self._run(json.dumps(settings))
        logits = (np.load(self.folder / f"{number}.npy") for number in range(len(self.windows)))
        return str(answer["version"]), logits

    def _run(self, settings: str) -> dict[str, object]:
        # The files beside the script are no modules of its own.
        environment = {**os.environ, "PYTHONSAFEPATH": "1"}
        command = [str(self.python), str(CHILD), settings]
        try:
            done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
        except OSError as error:
            raise BenchError(
                f"{self.python} cannot be started: {error}", hint="check --nncf-python"
            ) from error
        lines = done.stdout.strip().splitlines()
        if done.returncode or not lines:
            tail = " | ".join(done.stderr.strip().splitlines()[-3:])
            raise BenchError(
                f"NNCF's process ended with status {done.returncode}: {tail}",
                hint="--nncf-python takes the Python of a venv with nncf and openvino",
            )
        answer: dict[str, object] = json.loads(lines[-1])
        return answer
