"""A folder that appears whole or not at all.

``AtomicFolder(final)`` hands out the sibling ``.NAME.partial``; leaving the ``with`` block normally renames
it to ``NAME``. With overwrite, the old bundle waits in ``.NAME.old`` for the moment between two renames. A
killed process leaves a partial, which is no bundle, and the next AtomicFolder on the same name clears up.
"""

from __future__ import annotations

import contextlib
import errno
import os
import shutil
import signal
import sys
import threading
from pathlib import Path
from types import FrameType, TracebackType
from typing import NoReturn

from cpm_edge.runtimes.errors import BundleError
from cpm_edge.runtimes.manifest import MANIFEST


class AtomicFolder:
    """Context manager that yields the folder to write into.

    Args:
        final: the folder to make. Missing parents are made, and removed again on failure.
        overwrite: replace an existing bundle (or an empty folder).
        option: that chose ``final``, for error messages.
        marker: a file that shows that a folder may be replaced; a bundle's manifest.

    Raises (on entering):
        BundleError: ``final`` exists and may not be replaced, or another process is writing it now.
    """

    def __init__(
        self,
        final: str | os.PathLike[str],
        overwrite: bool = False,
        *,
        option: str = "-o",
        marker: str = MANIFEST,
    ) -> None:
        # Resolved, so that a link to a bundle on another disk is replaced where it is.
        self.final = Path(final).resolve()
        self.overwrite = overwrite
        self.option = option
        self.marker = marker
        self.partial = self.final.parent / f".{self.final.name}.partial"
        self._old = self.final.parent / f".{self.final.name}.old"
        self._lock = _Lock(self.final.parent / f".{self.final.name}.lock", option)
        self._made_parents: list[Path] = []
        self._term = _TerminateAsExit()

    def __enter__(self) -> Path:
        self.check()
        try:
            self._make_parents()
            try:
                self._lock.acquire()
                self._recover()
                self.check()
                _remove(self.partial)
                self._term.install()
                self.partial.mkdir()
            except BaseException:
                self._release()
                raise
        except BaseException:
            self._remove_parents()
            raise
        return self.partial

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        committed = False
        try:
            if kind is None:
                _sync(self.partial)
                self._swap_in()
                committed = True
        finally:
            if not committed:
                _remove(self.partial)
            self._release()
            if not committed:
                self._remove_parents()

    def check(self) -> None:
        """Whether ``final`` may be written, asked before entering, which asks again.

        Raises:
            BundleError: it exists and may not be replaced.
        """
        if not self.final.exists():
            return
        if not self.overwrite:
            raise BundleError(
                f"the output {self.final} exists already",
                hint=f"Choose another {self.option}, or replace it with --overwrite.",
            )
        ours = (self.final / self.marker).is_file()
        if not ours and not (self.final.is_dir() and not any(self.final.iterdir())):
            kind = "a bundle" if self.marker == MANIFEST else "one that this option wrote"
            raise BundleError(
                f"will not overwrite {self.final}: it is not {kind} (it has no {self.marker})",
                hint=f"Choose another {self.option}, or remove it yourself.",
            )

    def _recover(self) -> None:
        # A process killed between the two renames left the bundle in .old; killed later, it left only waste.
        if self._old.exists() and not self.final.exists():
            self._old.rename(self.final)
        _remove(self._old)

    def _swap_in(self) -> None:
        had_old = self.final.exists()
        if had_old:
            self.final.rename(self._old)
        try:
            self.partial.rename(self.final)
        except BaseException:
            if had_old and not self.final.exists():
                self._old.rename(self.final)
            raise
        _sync_folder(self.final.parent)
        _remove(self._old)

    def _release(self) -> None:
        self._term.restore()
        self._lock.release()

    def _make_parents(self) -> None:
        missing = [p for p in self.final.parents if not p.exists()]
        for parent in reversed(missing):
            parent.mkdir(exist_ok=True)
            self._made_parents.append(parent)

    def _remove_parents(self) -> None:
        for parent in reversed(self._made_parents):
            with contextlib.suppress(OSError):  # somebody else put something there meanwhile
                parent.rmdir()


class _Lock:
    """A lock file that the system releases when its process ends, however it ends."""

    def __init__(self, path: Path, option: str) -> None:
        self._path = path
        self._option = option
        self._fd: int | None = None

    def acquire(self) -> None:
        while True:
            fd = os.open(self._path, os.O_RDWR | os.O_CREAT, 0o644)
            if not _try_lock(fd):
                owner = _owner(fd)
                os.close(fd)
                raise BundleError(
                    f"another export is writing this output now{owner}",
                    hint=f"Wait for it to end, or choose another {self._option}.",
                )
            if _same_file(fd, self._path):
                break
            os.close(fd)  # its last owner removed the file between our open and our lock
        self._fd = fd
        with contextlib.suppress(OSError):  # a full disk: only the owner's number is lost
            os.ftruncate(fd, 0)
            os.write(fd, f"{os.getpid()}\n".encode())

    def release(self) -> None:
        if self._fd is None:
            return
        fd, self._fd = self._fd, None
        if sys.platform == "win32":  # an open file cannot be removed there
            os.close(fd)
            with contextlib.suppress(OSError):
                self._path.unlink()
            return
        self._path.unlink(missing_ok=True)
        os.close(fd)


if sys.platform == "win32":
    import msvcrt

    def _try_lock(fd: int) -> bool:
        try:
            os.lseek(fd, 1 << 20, os.SEEK_SET)  # a byte past the text: locked bytes cannot be read by others
            msvcrt.locking(fd, msvcrt.LK_NBLCK, 1)
        except OSError:
            return False
        os.lseek(fd, 0, os.SEEK_SET)
        return True

else:
    import fcntl

    def _try_lock(fd: int) -> bool:
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            # A file system without locks must not stop an export; there is then no protection.
            return error.errno not in (errno.EWOULDBLOCK, errno.EACCES)
        return True


def _owner(fd: int) -> str:
    os.lseek(fd, 0, os.SEEK_SET)
    text = os.read(fd, 32).strip().decode(errors="replace")
    return f" (process {text})" if text else ""


def _same_file(fd: int, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(fd), path.stat())
    except FileNotFoundError:
        return False


class _TerminateAsExit:
    """While installed, SIGTERM unwinds the stack like Ctrl-C does, so that the partial is removed."""

    def __init__(self) -> None:
        self._active = False

    def install(self) -> None:
        # Only the main thread may set handlers, and a program's own handler stays.
        in_main = threading.current_thread() is threading.main_thread()
        if in_main and signal.getsignal(signal.SIGTERM) == signal.SIG_DFL:
            signal.signal(signal.SIGTERM, _exit_on_signal)
            self._active = True

    def restore(self) -> None:
        if self._active:
            signal.signal(signal.SIGTERM, signal.SIG_DFL)
            self._active = False


def _exit_on_signal(number: int, frame: FrameType | None) -> NoReturn:
    raise SystemExit(128 + number)


def _remove(folder: Path) -> None:
    if folder.exists():
        # The manifest goes first: what an interruption leaves must not look like a bundle.
        (folder / MANIFEST).unlink(missing_ok=True)
        shutil.rmtree(folder)


def _sync(folder: Path) -> None:
    for item in folder.rglob("*"):
        if item.is_file():
            fd = os.open(item, os.O_RDWR | getattr(os, "O_BINARY", 0))
            try:
                os.fsync(fd)
            finally:
                os.close(fd)
    for item in (*(i for i in folder.rglob("*") if i.is_dir()), folder):
        _sync_folder(item)


def _sync_folder(folder: Path) -> None:
    if sys.platform != "win32":  # Windows has no such call; NTFS journals its directories
        fd = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(fd)
        finally:
            os.close(fd)
