"""Ctrl-C, a kill and a second export in the middle of an export."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest

from tests.bad_input.bench import Bench, parse

# Runs cpm-export and stops for good, with the output folder half written, when it reaches a function.
DRIVER = """
import sys, time
from importlib import import_module
from unittest.mock import patch
from cpm_edge.exporter.cli import main

holder = import_module(sys.argv[1])
*outer, name = sys.argv[2].split(".")
for part in outer:
    holder = getattr(holder, part)

def stop(*_):
    print("there", flush=True)
    time.sleep(600)

with patch.object(holder, name, stop):
    main(sys.argv[3:])
"""
MIDDLE = ("cpm_edge.exporter.export", "_trace")  # the tokenizer is written, no weight is


@contextmanager
def stopped_export(bench: Bench) -> Iterator[subprocess.Popen[str]]:
    """A process of its own that is in the middle of an export."""
    command = [sys.executable, "-c", DRIVER, *MIDDLE, "--model", str(bench.checkpoint), "--target", "ort"]
    process = subprocess.Popen(
        [*command, "-o", str(bench.output), "--no-verify"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        assert process.stdout is not None
        assert process.stdout.readline() == "there\n", process.communicate()
        yield process
    finally:
        process.kill()
        process.wait()
        for pipe in (process.stdout, process.stderr):
            assert pipe is not None
            pipe.close()


def leftovers(bench: Bench) -> list[str]:
    return sorted(path.name for path in bench.output.parent.iterdir())


@pytest.mark.parametrize(("number", "status"), [(signal.SIGINT, 1), (signal.SIGTERM, 143)])
def test_a_polite_signal_clears_up(bench: Bench, number: signal.Signals, status: int) -> None:
    before = bench.files()
    with stopped_export(bench) as process:
        assert leftovers(bench) == [".bundle.lock", ".bundle.partial"]
        process.send_signal(number)
        _, stderr = process.communicate(timeout=30)
        assert process.returncode == status
    assert bench.files() == before
    if number == signal.SIGINT:
        parse(stderr).says("interrupted", hint="run the command again")


def test_a_kill_leaves_no_bundle_and_the_next_export_clears_up(bench: Bench) -> None:
    with stopped_export(bench) as process:
        process.send_signal(signal.SIGKILL)
        process.wait(timeout=30)
    assert leftovers(bench) == [".bundle.lock", ".bundle.partial"]
    partial = bench.output.parent / ".bundle.partial"
    assert (partial / "tokenizer.json").stat().st_size > 0
    bench.run_fails(bench.output).says("there is no bundle folder", hint="cpm-export")
    bench.run_fails(partial).says("is not a bundle", hint="cpm-export")
    assert bench.export().exit_code == 0
    assert leftovers(bench) == ["bundle"]
    assert bench.run(bench.output).exit_code == 0


def test_two_exports_into_one_folder(bench: Bench) -> None:
    with stopped_export(bench) as first:
        refusal = bench.export_fails()
        refusal.says("another export is writing this output now", f"process {first.pid}", hint="Wait")
        bench.export_fails("--overwrite").says("another export", hint="another -o")
    # The first one is dead now.
    assert bench.export().exit_code == 0
    assert leftovers(bench) == ["bundle"]


PLACES = [
    ("ort", "cpm_edge.exporter.export", "_copy_assets", False),
    ("ort", "cpm_edge.exporter.weights", "quantize", False),
    ("ort", "cpm_edge.exporter.weights", "quantize", True),
    ("ort", "onnx_ir", "save", False),
    ("ort", "cpm_edge.exporter.export", "hash_files", False),
    ("ort", "cpm_edge.exporter.export", "write_manifest", True),
    ("ort", "os", "fsync", False),
    ("ort", "os", "fsync", True),
    ("aipc", "openvino", "serialize", True),
    ("aipc", "cpm_edge.exporter.weights", "quantize", False),
    ("aipc", "openvino", "save_model", False),
]


@pytest.mark.parametrize(("target", "module", "name", "overwrite"), PLACES)
def test_ctrl_c_anywhere(
    bench: Bench, monkeypatch: pytest.MonkeyPatch, target: str, module: str, name: str, overwrite: bool
) -> None:
    if overwrite:
        assert bench.export(target=target).exit_code == 0
    before = bench.files()

    def interrupt(*_: Any, **__: Any) -> None:
        os.kill(os.getpid(), signal.SIGINT)

    monkeypatch.setattr(f"{module}.{name}", interrupt)
    result = bench.export(*["--overwrite"] * overwrite, target=target)
    monkeypatch.undo()
    assert (result.exit_code, result.stdout) == (1, "")
    parse(result.stderr).says("interrupted", hint="run the command again")
    assert bench.files() == before
    if overwrite:
        assert bench.run(bench.output).exit_code == 0


DIVERGED = {
    "passed": False,
    "first_diverging_layer": 1,
    "judged_by": "cosine",
    "cosine": 0.5,
    "expected_cosine": 0.9,
}


def test_ctrl_c_during_the_verification(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    """The bundle is whole but not verified: it does not appear, and was no bundle meanwhile."""
    before = bench.files()
    seen = []

    def interrupt(*_: Any, **__: Any) -> None:
        partial = bench.output.parent / ".bundle.partial"
        seen.append(sorted(path.name for path in partial.iterdir()))
        os.kill(os.getpid(), signal.SIGINT)

    monkeypatch.setattr("subprocess.run", interrupt)
    result = bench.export("--verify")
    monkeypatch.undo()
    assert result.exit_code == 1
    assert bench.files() == before
    assert "model.onnx" in seen[0]
    assert "cpm_edge.json" not in seen[0]


@pytest.mark.parametrize(
    ("report", "words", "hint"),
    [
        ((0, json.dumps(DIVERGED), ""), ["cosine 0.500000", "at least 0.9", "layer 1"], "report"),
        ((1, "", "Traceback\nMemoryError: no more"), ["could not run", "no more"], "--no-verify"),
        ((-9, "", ""), ["could not run", "exit code -9"], "--no-verify"),
    ],
)
def test_a_verification_that_fails(
    bench: Bench, monkeypatch: pytest.MonkeyPatch, report: tuple[int, str, str], words: list[str], hint: str
) -> None:
    def child(command: list[str], **_: Any) -> subprocess.CompletedProcess[str]:
        return subprocess.CompletedProcess(command, *report)

    monkeypatch.setattr("subprocess.run", child)
    bench.export_fails("--verify").says(*words, hint=hint)
