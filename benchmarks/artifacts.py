"""What a measurement runs on: random checkpoints, our bundles and the peers' files, each made once.

Everything is made in one child process, so that the memory of the measuring process is that of the runtime.
Names hold a digest of the shape and of the code that writes the file: what is kept is never out of date.
"""

from __future__ import annotations

import functools
import hashlib
import importlib.util
import json
import multiprocessing
import shutil
import tempfile
import warnings
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

from cpm_edge.benchmarks.shape import Shape
from cpm_edge.exporter.progress import Progress


@dataclass(frozen=True)
class Build:
    """One export for target aipc, by the names of ``cpm-export``'s options."""

    flavour: str = "native"
    weight_format: str = "int4"
    group_size: int | None = 32
    attention: str = "auto"

    @property
    def label(self) -> str:
        """For people: the weights."""
        return f"{self.weight_format} g{self.group_size}" if self.group_size else self.weight_format

    @property
    def folder(self) -> str:
        return f"{self.flavour}-{self.weight_format}-g{self.group_size}-{self.attention}"


class Artifacts:
    """The files of one shape.

    Args:
        shape: of the model.
        cache: folder that keeps them for later runs; None for a temporary one.
        ternary: the checkpoint's linear layers are ternary.
    """

    def __init__(self, shape: Shape, cache: Path | None, *, ternary: bool = False) -> None:
        self.shape = shape
        self.ternary = ternary
        self._temporary = None if cache else tempfile.TemporaryDirectory(prefix="cpm-bench-")
        root = Path(self._temporary.name) if self._temporary else Path(str(cache)).resolve()
        self.folder = root / f"{shape.name}-{digest(shape.config, ternary)}"
        self.folder.mkdir(parents=True, exist_ok=True)
        self._child: ProcessPoolExecutor | None = None

    def checkpoint(self) -> Path:
        """The random checkpoint."""
        name = f"checkpoint-{code_digest('benchmarks.random_checkpoint')}"
        return self._made(name, f"Writing a random checkpoint ({self.shape.name})", self._checkpoint)

    def bundle(self, build: Build) -> Path:
        """Our export."""
        name = f"{build.folder}-{code_digest('exporter', 'quant', 'plugins')}"
        return self._made(name, f"Exporting {build.flavour} {build.label}", self._bundle, build)

    def gguf(self, format_: str) -> Path:
        """llama.cpp's file."""
        name = f"{format_}-{code_digest('benchmarks.peers.gguf_file')}.gguf"
        return self._made(name, f"Writing a GGUF in {format_}", self._gguf, format_)

    def llama_checkpoint(self) -> Path:
        """The same weights under a Llama config, for exporters that do not know MiniCPM."""
        name = f"llama-{code_digest('benchmarks.random_checkpoint', 'benchmarks.llama_config')}"
        return self._made(name, "Linking the checkpoint as Llama", self._llama)

    def finish(self) -> None:
        """Everything is made: end the child process, and drop the checkpoint unless it is kept."""
        if self._child is not None:
            self._child.shutdown()
            self._child = None
        if self._temporary is not None:
            for path in self.folder.glob("checkpoint-*"):
                shutil.rmtree(path)

    def __enter__(self) -> Artifacts:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.finish()
        if self._temporary is not None:
            self._temporary.cleanup()

    def run(self, function: Callable[..., None], *arguments: Any) -> None:
        """Call a function in the child process."""
        if self._child is None:
            self._child = ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn"))
        self._child.submit(function, *arguments).result()

    def _made(self, name: str, what: str, make: Callable[..., None], *arguments: Any) -> Path:
        """The file or folder ``name``; made under another name first, so that what exists is whole."""
        path = self.folder / name
        if not path.exists():
            partial = self.folder / f".partial-{name}"
            shutil.rmtree(partial, ignore_errors=True)
            partial.unlink(missing_ok=True)
            make(partial, *arguments, what)
            partial.rename(path)
        return path

    def _checkpoint(self, path: Path, what: str) -> None:
        with Progress().stage(what):
            self.run(_write_checkpoint, self.shape, path, self.ternary)

    def _bundle(self, path: Path, build: Build, what: str) -> None:
        source = self.checkpoint()
        with Progress().stage(what):
            self.run(_export, source, path, build)

    def _gguf(self, path: Path, format_: str, what: str) -> None:
        source = self.checkpoint()
        with Progress().stage(what):
            self.run(_write_gguf, source, path, format_)

    def _llama(self, path: Path, what: str) -> None:
        from cpm_edge.benchmarks.llama_config import as_llama

        as_llama(self.checkpoint(), path)


def digest(*values: Any) -> str:
    """A short name for JSON-ready values."""
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()[:12]


@functools.cache
def code_digest(*modules: str) -> str:
    """Changes with the code of these modules of ours, a package counting with everything below it."""
    whole = hashlib.sha256()
    for name in modules:
        file = Path(str(importlib.util.find_spec(f"cpm_edge.{name}").origin))  # type: ignore[union-attr]
        for path in sorted(file.parent.rglob("*.py")) if file.name == "__init__.py" else [file]:
            whole.update(path.read_bytes())
    return whole.hexdigest()[:8]


def _write_checkpoint(shape: Shape, path: Path, ternary: bool) -> None:
    from cpm_edge.benchmarks.random_checkpoint import write_checkpoint

    write_checkpoint(shape, path, ternary=ternary)


def _export(checkpoint: Path, output: Path, build: Build) -> None:
    from cpm_edge.exporter.errors import ExportWarning
    from cpm_edge.exporter.export import export
    from cpm_edge.exporter.options import ExportOptions

    options = ExportOptions(
        model=str(checkpoint),
        target="aipc",
        output=output,
        flavour=build.flavour,
        weight_format=build.weight_format,
        group_size=build.group_size,
        attention=build.attention,
        verify=False,
    )
    with warnings.catch_warnings():
        # That random ternary weights are quantized again is what was asked for.
        warnings.simplefilter("ignore", ExportWarning)
        export(options, Progress(enabled=False))


def _write_gguf(checkpoint: Path, file: Path, format_: str) -> None:
    from cpm_edge.benchmarks.peers.gguf_file import write_gguf

    write_gguf(checkpoint, file, format_)
