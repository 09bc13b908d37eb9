"""An OpenVINO IR folder that somebody else exported, measured by a Python that may be another venv's."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from cpm_edge.benchmarks.errors import BenchError

CHILD = Path(__file__).with_name("openvino_child.py")
MODEL = "openvino_model.xml"


class OpenVinoIrPeer:
    """A child process that holds the compiled model and measures when asked.

    Args:
        folder: holds openvino_model.xml, stateful, as optimum-intel writes it.
        python: an interpreter that can import openvino; None for this one.
        vocab_size: prompts are random tokens.

    Raises:
        BenchError: the child cannot open the model; ends with what it printed last.
    """

    def __init__(
        self, label: str, folder: Path, threads: int, vocab_size: int, python: Path | None = None
    ) -> None:
        self.label = label
        self._errors = tempfile.TemporaryFile("w+")  # noqa: SIM115 - closed with the child
        settings = {"model": str(folder / MODEL), "threads": threads, "vocab_size": vocab_size}
        command = [str(python or sys.executable), str(CHILD), json.dumps(settings)]
        try:
            self._child = subprocess.Popen(
                command,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=self._errors,
                text=True,
                # The files beside the script are no modules of its own.
                env={**os.environ, "PYTHONSAFEPATH": "1"},
            )
        except OSError as error:
            self._errors.close()
            raise BenchError(
                f"{command[0]} cannot be started: {error}", hint="check --openvino-python"
            ) from error
        try:
            self.version = str(self._answer()["version"])
        except BenchError:
            self.close()
            raise

    def prefill(self, tokens: int) -> float:
        return float(self._ask(do="prefill", tokens=tokens)["rate"])

    def decode(self, context: int, new_tokens: int) -> float:
        return float(self._ask(do="decode", context=context, new_tokens=new_tokens)["rate"])

    def close(self) -> None:
        assert self._child.stdin is not None and self._child.stdout is not None
        self._child.stdin.close()
        self._child.wait()
        self._child.stdout.close()
        self._errors.close()

    def _ask(self, **request: Any) -> dict[str, Any]:
        assert self._child.stdin is not None
        self._child.stdin.write(json.dumps(request) + "\n")
        self._child.stdin.flush()
        return self._answer()

    def _answer(self) -> dict[str, Any]:
        assert self._child.stdout is not None
        line = self._child.stdout.readline()
        if not line:
            self._child.wait()
            self._errors.seek(0)
            tail = " | ".join(self._errors.read().strip().splitlines()[-3:])
            raise BenchError(
                f"{self.label}: its process ended with status {self._child.returncode}: {tail}",
                hint="--openvino-ir takes a folder with a stateful openvino_model.xml, "
                "--openvino-python an interpreter that has openvino",
            )
        answer: dict[str, Any] = json.loads(line)
        return answer
