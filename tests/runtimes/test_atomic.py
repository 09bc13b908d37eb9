from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from cpm_edge.runtimes.atomic import AtomicFolder
from cpm_edge.runtimes.bundle import MANIFEST
from cpm_edge.runtimes.errors import BundleError


def write(folder: Path, text: str) -> None:
    (folder / "sub").mkdir()
    (folder / "sub" / "data").write_text(text)
    (folder / MANIFEST).write_text("{}")


def content(folder: Path) -> str:
    return (folder / "sub" / "data").read_text()


def names(folder: Path) -> list[str]:
    return sorted(item.name for item in folder.iterdir())


def test_the_folder_appears_at_the_end(tmp_path: Path) -> None:
    final = tmp_path / "new" / "parents" / "out"
    with AtomicFolder(final) as folder:
        assert folder.name == ".out.partial"
        write(folder, "one")
        assert not final.exists()
    assert content(final) == "one"
    assert names(final.parent) == ["out"]


@pytest.mark.parametrize("error", [ValueError("x"), KeyboardInterrupt(), SystemExit(3)])
def test_a_failure_leaves_nothing(tmp_path: Path, error: BaseException) -> None:
    with pytest.raises(type(error)), AtomicFolder(tmp_path / "new" / "out") as folder:
        write(folder, "one")
        raise error
    assert names(tmp_path) == []


def test_an_existing_output_is_refused(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    with pytest.raises(BundleError, match="exists already") as caught, AtomicFolder(tmp_path / "out"):
        pass
    assert "--overwrite" in (caught.value.hint or "")
    assert names(tmp_path) == ["out"]


def test_overwrite_replaces_a_bundle(tmp_path: Path) -> None:
    for text in ("one", "two"):
        with AtomicFolder(tmp_path / "out", overwrite=True) as folder:
            write(folder, text)
    assert content(tmp_path / "out") == "two"
    assert names(tmp_path) == ["out"]


def test_a_failed_overwrite_keeps_the_old_bundle(tmp_path: Path) -> None:
    with AtomicFolder(tmp_path / "out") as folder:
        write(folder, "one")
    with pytest.raises(ValueError, match="x"), AtomicFolder(tmp_path / "out", overwrite=True) as folder:
        write(folder, "two")
        raise ValueError("x")
    assert content(tmp_path / "out") == "one"
    assert names(tmp_path) == ["out"]


def test_a_failed_rename_puts_the_old_bundle_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with AtomicFolder(tmp_path / "out") as folder:
        write(folder, "one")
    real = Path.rename

    def rename(self: Path, target: Path) -> Path:
        if self.name == ".out.partial":
            raise PermissionError("in use")
        return real(self, target)

    monkeypatch.setattr(Path, "rename", rename)
    with pytest.raises(PermissionError), AtomicFolder(tmp_path / "out", overwrite=True) as folder:
        write(folder, "two")
    assert content(tmp_path / "out") == "one"
    assert names(tmp_path) == ["out"]


@pytest.mark.parametrize("kind", ["folder", "file"])
def test_overwrite_spares_what_is_no_bundle(tmp_path: Path, kind: str) -> None:
    out = tmp_path / "out"
    if kind == "folder":
        out.mkdir()
        (out / "thesis.doc").write_text("precious")
    else:
        out.write_text("precious")
    with pytest.raises(BundleError, match="it is not a bundle"), AtomicFolder(out, overwrite=True):
        pass
    assert out.exists()


def test_overwrite_takes_an_empty_folder(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    with AtomicFolder(tmp_path / "out", overwrite=True) as folder:
        write(folder, "one")
    assert content(tmp_path / "out") == "one"


def test_a_link_to_a_bundle_is_followed(tmp_path: Path) -> None:
    with AtomicFolder(tmp_path / "real") as folder:
        write(folder, "one")
    (tmp_path / "link").symlink_to(tmp_path / "real")
    with AtomicFolder(tmp_path / "link", overwrite=True) as folder:
        write(folder, "two")
    assert content(tmp_path / "real") == "two"
    assert (tmp_path / "link").is_symlink()


def test_a_leftover_partial_is_removed(tmp_path: Path) -> None:
    leftover = tmp_path / ".out.partial"
    leftover.mkdir()
    (leftover / "junk").write_text("junk")
    with AtomicFolder(tmp_path / "out") as folder:
        write(folder, "one")
    assert names(tmp_path / "out") == [MANIFEST, "sub"]


@pytest.mark.parametrize("new_is_in_place", [False, True])
def test_recovery_after_a_kill_between_the_renames(tmp_path: Path, new_is_in_place: bool) -> None:
    old = tmp_path / ".out.old"
    old.mkdir()
    write(old, "old")
    if new_is_in_place:
        (tmp_path / "out").mkdir()
        write(tmp_path / "out", "new")
    with pytest.raises(ValueError, match="x"), AtomicFolder(tmp_path / "out", overwrite=True):
        raise ValueError("x")
    assert content(tmp_path / "out") == ("new" if new_is_in_place else "old")
    assert names(tmp_path) == ["out"]


def test_recovery_needs_no_overwrite_to_protect_the_old_bundle(tmp_path: Path) -> None:
    old = tmp_path / ".out.old"
    old.mkdir()
    write(old, "old")
    with pytest.raises(BundleError, match="exists already"), AtomicFolder(tmp_path / "out"):
        pass
    assert content(tmp_path / "out") == "old"


WRITER = """
import sys, time
from pathlib import Path
from cpm_edge.runtimes.atomic import AtomicFolder
with AtomicFolder(Path(sys.argv[1])) as folder:
    (folder / "data").write_text("half")
    print("writing", flush=True)
    time.sleep(60)
"""


def start_writer(final: Path) -> subprocess.Popen[str]:
    process = subprocess.Popen([sys.executable, "-c", WRITER, str(final)], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stdout.readline() == "writing\n"
    return process


def stop(process: subprocess.Popen[str], number: int) -> int:
    os.kill(process.pid, number)
    process.communicate(timeout=30)
    return process.returncode


def test_a_second_writer_is_refused_and_a_killed_one_cleaned_up(tmp_path: Path) -> None:
    final = tmp_path / "out"
    process = start_writer(final)
    with (
        pytest.raises(BundleError, match=f"another export is writing.*process {process.pid}"),
        AtomicFolder(final),
    ):
        pass
    assert (tmp_path / ".out.partial" / "data").exists()
    stop(process, signal.SIGKILL)
    assert ".out.partial" in names(tmp_path)
    assert not final.exists()
    with AtomicFolder(final) as folder:
        assert names(folder) == []
        write(folder, "whole")
    assert content(final) == "whole"
    assert names(tmp_path) == ["out"]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_signals_remove_the_partial(tmp_path: Path, number: int) -> None:
    code = stop(start_writer(tmp_path / "out"), number)
    assert code in (128 + number, -number, 1)
    assert names(tmp_path) == []


def test_the_handler_for_sigterm_is_put_back(tmp_path: Path) -> None:
    before = signal.getsignal(signal.SIGTERM)
    with AtomicFolder(tmp_path / "out") as folder:
        assert signal.getsignal(signal.SIGTERM) != before
        write(folder, "one")
    assert signal.getsignal(signal.SIGTERM) == before
