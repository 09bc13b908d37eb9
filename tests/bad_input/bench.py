"""A place to try one bad input: a checkpoint to spoil, the two commands, and what a refusal looks like."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from click.testing import CliRunner, Result
from safetensors.numpy import load_file, save_file

from cpm_edge.exporter.cli import main as cpm_export
from cpm_edge.runtimes.cli import main as cpm_run
from tests.support.checkpoints import Tensors

QUESTION = ("--prompt", "hi", "--max-new-tokens", "2")
SHARDS = ("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors")
INDEX = "model.safetensors.index.json"


@dataclass
class Bench:
    """One test's folder.

    Attributes:
        root: everything the commands may touch lies below it.
        checkpoint: a valid checkpoint of our own, for the test to damage.
        output: where bundles go; its parent folder does not exist either.
    """

    root: Path
    checkpoint: Path
    output: Path = field(init=False)

    def __post_init__(self) -> None:
        self.output = self.root / "made" / "bundle"

    def export(self, *arguments: str, target: str = "ort", model: str | Path | None = None) -> Result:
        """cpm-export without verification, in this process."""
        source = str(model or self.checkpoint)
        usual = ["--model", source, "--target", target, "-o", str(self.output), "--no-verify"]
        return CliRunner().invoke(cpm_export, [*usual, *arguments])

    def run(self, bundle: Path, *arguments: str) -> Result:
        """cpm-run, in this process."""
        return CliRunner().invoke(cpm_run, [str(bundle), *(arguments or QUESTION)])

    def export_fails(self, *arguments: str, target: str = "ort", model: str | Path | None = None) -> Refusal:
        """Export, and check everything that all refusals have in common."""
        return self.fails(lambda: self.export(*arguments, target=target, model=model))

    def run_fails(self, bundle: Path, *arguments: str) -> Refusal:
        """Run, and check everything that all refusals have in common."""
        return self.fails(lambda: self.run(bundle, *arguments))

    def fails(self, command: Callable[[], Result]) -> Refusal:
        before = self.files()
        refusal = refused(command())
        assert self.files() == before, "a refusal leaves nothing behind"
        return refusal

    def files(self) -> list[str]:
        """Every file and folder below the root, hidden ones too."""
        return sorted(str(path.relative_to(self.root)) for path in self.root.rglob("*"))

    def edit(self, name: str, **changes: Any) -> None:
        """Change keys of a JSON file of the checkpoint."""
        path = self.checkpoint / name
        path.write_text(json.dumps(json.loads(path.read_text()) | changes))

    def tensors(self) -> Tensors:
        return load_file(self.checkpoint / "model.safetensors")

    def save(self, tensors: Tensors) -> None:
        save_file(tensors, self.checkpoint / "model.safetensors")

    def shard(self) -> dict[str, str]:
        """Split the weights over two files; returns the index: tensor to file."""
        tensors = self.tensors()
        (self.checkpoint / "model.safetensors").unlink()
        halves = np.array_split(np.array(sorted(tensors)), 2)
        index: dict[str, str] = {}
        for shard, names in zip(SHARDS, halves, strict=True):
            save_file({name: tensors[name] for name in names.tolist()}, self.checkpoint / shard)
            index |= dict.fromkeys(names.tolist(), shard)
        self.write_index(index)
        return index

    def write_index(self, index: dict[str, str]) -> None:
        (self.checkpoint / INDEX).write_text(json.dumps({"weight_map": index}))


@dataclass(frozen=True)
class Refusal:
    """What a failed command printed.

    Attributes:
        error, hint: the texts behind ``error:`` and ``hint:``.
        warnings: the texts behind ``warning:``.
    """

    error: str
    hint: str
    warnings: list[str]

    def says(self, *words: str, hint: str) -> None:
        """The error holds all of ``words``, and the hint ``hint``."""
        assert all(word in self.error for word in words), (words, self.error)
        assert hint in self.hint


def refused(result: Result) -> Refusal:
    """Check the shape of a refusal: exit 1, one error with one hint on stderr, no traceback, no stdout."""
    assert isinstance(result.exception, SystemExit), repr(result.exception)
    assert (result.exit_code, result.stdout) == (1, ""), result.output
    return parse(result.stderr)


def parse(stderr: str) -> Refusal:
    assert "Traceback" not in stderr
    lines = [line for line in stderr.split("\n") if line]
    warnings = [line.removeprefix("warning: ") for line in lines if line.startswith("warning: ")]
    rest = lines[len(warnings) :]
    assert rest[0].startswith("error: "), stderr
    assert rest[-1].startswith("hint: "), stderr
    assert sum(line.startswith(("error:", "hint:")) for line in rest) == 2, stderr
    error = "\n".join(rest[:-1]).removeprefix("error: ")
    return Refusal(error, rest[-1].removeprefix("hint: "), warnings)
