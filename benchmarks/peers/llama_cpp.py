"""llama.cpp, through its own ``llama-bench``: one process for each measurement."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path
from typing import Any

from cpm_edge.benchmarks.errors import BenchError


class LlamaCppPeer:
    """One GGUF with or without flash attention.

    Args:
        binary: ``llama-bench``.
        flash: 0 or 1, for ``-fa``.
    """

    def __init__(self, binary: Path, model: Path, format_: str, threads: int, flash: int) -> None:
        self.label = f"llama.cpp {format_}, -fa {flash}"
        self.build: str | None = None
        self._command = [str(binary), "-m", str(model), "-t", str(threads), "-fa", str(flash), "-r", "1"]
        self._command += ["-ngl", "0", "-o", "json"]

    def prefill(self, tokens: int) -> float:
        return self._rate("-p", str(tokens), "-n", "0")

    def decode(self, context: int, new_tokens: int) -> float:
        return self._rate("-p", "0", "-n", str(new_tokens), "-d", str(context))

    def close(self) -> None:
        """Nothing is kept between measurements."""

    def _rate(self, *arguments: str) -> float:
        try:
            done = subprocess.run([*self._command, *arguments], capture_output=True, text=True, check=False)
        except OSError as error:
            raise BenchError(f"llama-bench cannot be started: {error}", hint="check --llama-bench") from error
        if done.returncode:
            tail = " | ".join(done.stderr.strip().splitlines()[-3:])
            raise BenchError(f"llama-bench failed with status {done.returncode}: {tail}")
        row = single_row(done.stdout)
        self.build = f"{row.get('build_commit', 'unknown')} ({row.get('build_number', '?')})"
        return float(row["avg_ts"])


def single_row(output: str) -> dict[str, Any]:
    """The one measurement in llama-bench's JSON.

    Raises:
        BenchError: it is not JSON, or not one measurement with a rate.
    """
    try:
        (row,) = json.loads(output)
        float(row["avg_ts"])
    except (ValueError, KeyError, TypeError) as error:
        raise BenchError(
            f"llama-bench: expected a JSON array of one measurement with avg_ts, got {output[:200]!r}",
            hint="check that --llama-bench is llama.cpp's llama-bench, of 2025 or later",
        ) from error
    return dict(row)
