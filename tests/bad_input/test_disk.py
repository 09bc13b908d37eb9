"""A disk that fills up or fails in the middle: one clear error, and the disk as it was."""

from __future__ import annotations

import errno
import os
import subprocess
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest

from tests.bad_input.bench import Bench

SIZE = 4 << 20
PAGE = 4096

# Through what an export writes: a target, a module, and an attribute of it.
WRITERS = [
    ("ort", "pathlib", "Path.mkdir"),
    ("ort", "pathlib", "Path.open"),
    ("ort", "pathlib", "Path.write_text"),
    ("ort", "shutil", "copyfile"),
    ("ort", "onnx_ir", "save"),
    ("ort", "cpm_edge.exporter.export", "write_manifest"),
    ("ort", "os", "fsync"),
    ("ort", "pathlib", "Path.rename"),
    ("aipc", "pathlib", "Path.write_text"),
    ("aipc", "shutil", "copyfile"),
    ("aipc", "openvino", "serialize"),
    ("aipc", "openvino", "save_model"),
    ("aipc", "xml.etree.ElementTree", "ElementTree.write"),
    ("aipc", "cpm_edge.exporter.export", "write_manifest"),
]


@pytest.mark.parametrize(("target", "module", "name"), WRITERS)
def test_a_disk_that_fills_up(
    bench: Bench, monkeypatch: pytest.MonkeyPatch, target: str, module: str, name: str
) -> None:
    refuse_writes(bench, monkeypatch, errno.ENOSPC, module, name)
    bench.export_fails(target=target).says("cannot write", "the disk is full", hint="free some space")


@pytest.mark.parametrize(
    ("number", "what"),
    [
        (errno.EDQUOT, "the disk is full"),
        (errno.EIO, os.strerror(errno.EIO)),
        (errno.EROFS, os.strerror(errno.EROFS)),
        (errno.EACCES, os.strerror(errno.EACCES)),
    ],
)
@pytest.mark.parametrize("name", ["Path.mkdir", "Path.open", "Path.rename"])
def test_a_write_that_fails(
    bench: Bench, monkeypatch: pytest.MonkeyPatch, name: str, number: int, what: str
) -> None:
    refuse_writes(bench, monkeypatch, number, "pathlib", name)
    bench.export_fails().says("cannot write", what, hint="choose another -o")


def refuse_writes(bench: Bench, monkeypatch: pytest.MonkeyPatch, number: int, module: str, name: str) -> None:
    """Let a function fail where it is called for the output folder."""
    holder: Any = import_module(module)
    *outer, attribute = name.split(".")
    for part in outer:
        holder = getattr(holder, part)
    original = getattr(holder, attribute)

    def fails_there(*arguments: Any, **keywords: Any) -> Any:
        ours = str(bench.output.parent)
        if name == "fsync" or any(str(argument).startswith(ours) for argument in arguments):
            raise OSError(number, os.strerror(number), str(arguments[0]))
        return original(*arguments, **keywords)

    monkeypatch.setattr(holder, attribute, fails_there)


class SmallDisk:
    """A mounted tmpfs with a ballast file, which decides how much is left.

    Args:
        bench: its output moves onto the disk.
    """

    def __init__(self, bench: Bench) -> None:
        self.folder = bench.root / "disk"
        bench.output = self.folder / "made" / "bundle"

    def leave(self, free: int) -> None:
        """Fill the disk but for ``free`` bytes."""
        (self.folder / "ballast").write_bytes(b"\1" * (SIZE - free // PAGE * PAGE))


@pytest.fixture
def disk(bench: Bench) -> Iterator[SmallDisk]:
    small = SmallDisk(bench)
    small.folder.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", f"size={SIZE}", "tmpfs", str(small.folder)]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        reason = done.stderr.strip() if done.returncode else ""
    except FileNotFoundError as error:
        reason = str(error)
    if reason:
        pytest.skip(f"a small disk needs the right to mount a tmpfs: {reason}")
    yield small
    subprocess.run(["umount", str(small.folder)], check=True)


@pytest.mark.parametrize("target", ["ort", "aipc"])
def test_a_full_disk(bench: Bench, disk: SmallDisk, target: str) -> None:
    needed = bytes_needed(bench, disk, target)
    # From no room for the lock to just too little for the manifest.
    for share in (0.0, 0.02, 0.1, 0.3, 0.5, 0.7, 0.85, 0.92, 0.96, 0.98):
        disk.leave(int(share * needed))
        bench.export_fails(target=target).says("cannot write", "disk is full", hint="free some space")
    disk.leave(needed + 4 * PAGE)
    assert bench.export(target=target).exit_code == 0
    assert bench.run(bench.output).exit_code == 0


def bytes_needed(bench: Bench, disk: SmallDisk, target: str) -> int:
    """Space that the bundle takes, in whole pages."""
    assert bench.export(target=target).exit_code == 0
    sizes = [path.stat().st_size for path in bench.output.iterdir()]
    for path in bench.output.iterdir():
        path.unlink()
    bench.output.rmdir()
    bench.output.parent.rmdir()
    return sum(-(-size // PAGE) * PAGE for size in sizes)


def test_a_full_disk_keeps_the_bundle_that_was_to_be_overwritten(bench: Bench, disk: SmallDisk) -> None:
    assert bench.export().exit_code == 0
    disk.leave(SIZE // 8)
    bench.export_fails("--overwrite", "--weight-format", "fp32").says("disk is full", hint="free some space")
    assert bench.run(bench.output).exit_code == 0


def test_a_folder_where_nobody_may_write(bench: Bench) -> None:
    blocked = Path("/proc")
    if not blocked.is_dir():
        pytest.skip("there is no /proc here")
    bench.output = blocked / "bundle"
    bench.export_fails().says("cannot write", "/proc/bundle", hint="choose another -o")
