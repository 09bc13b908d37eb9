"""Opening a bundle: nothing reaches an engine before version, paths, sizes and hashes are checked."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cpm_edge.runtimes.errors import BackendError, BundleError
from cpm_edge.runtimes.manifest import (
    FORMAT_VERSION,
    MANIFEST,
    ContextLimits,
    FileEntry,
    Manifest,
    check_checksum,
)

__all__ = [
    "FORMAT_VERSION",
    "MANIFEST",
    "Bundle",
    "ContextLimits",
    "FileEntry",
    "Manifest",
    "check_engine",
    "hash_files",
    "open_bundle",
    "write_manifest",
]

_BLOCK = 1 << 20
_SHOW_PROGRESS_FROM = 1_000_000_000


@dataclass(frozen=True)
class Bundle:
    """A bundle folder whose files were found whole."""

    path: Path
    manifest: Manifest

    def file(self, name: str) -> Path:
        """Path of a file that the manifest lists.

        Raises:
            BundleError: the manifest does not list it; an unlisted file was never checked and is not used.
        """
        if name not in self.manifest.files:
            raise BundleError(f"{self.path} has no {name}", hint="Export the bundle again.")
        return self.path / name

    def optional(self, name: str) -> Path | None:
        """Path of a listed file, or None when the manifest does not list it."""
        return self.path / name if name in self.manifest.files else None

    def read_json(self, name: str) -> dict[str, Any]:
        """The object in a listed JSON file, empty when the manifest does not list it.

        Raises:
            BundleError: the file does not hold a JSON object.
        """
        path = self.optional(name)
        if path is None:
            return {}
        try:
            value = json.loads(path.read_text(encoding="utf-8"))
        except (ValueError, RecursionError) as error:
            raise BundleError(
                f"{name} is not valid JSON: {error}", hint="Export the bundle again."
            ) from error
        if not isinstance(value, dict):
            raise BundleError(f"{name}: expected a JSON object, got {type(value).__name__}")
        return value


def open_bundle(path: str | os.PathLike[str], check: bool = False) -> Bundle:
    """Check a bundle and read its manifest.

    Hashes that were found right before are remembered in the user's cache folder (CPM_EDGE_CACHE, else the
    platform's) and not computed again while no file changed.

    Args:
        path: the folder.
        check: compute every hash again.

    Raises:
        BundleError: no such folder, no or bad manifest, newer format, unsafe path, missing or damaged file.
    """
    folder = Path(path)
    if not folder.is_dir():
        raise BundleError(f"there is no bundle folder {folder}", hint=_missing_hint(folder))
    try:
        text = (folder / MANIFEST).read_bytes()
    except FileNotFoundError:
        raise BundleError(
            f"{folder} is not a bundle: it has no {MANIFEST}",
            hint="Make a bundle with: cpm-export --model DIR --target ort|aipc -o BUNDLE",
        ) from None
    manifest = Manifest.loads(text)
    root = folder.resolve()
    for name, entry in manifest.files.items():
        _check_size(_confined(root, name), name, entry)
    _check_hashes(root, manifest, hashlib.sha256(text).hexdigest(), force=check)
    check_checksum(text)
    return Bundle(root, manifest)


def check_engine(requires: str, version: str, *, name: str = "the engine") -> None:
    """Check an engine's version against a requirement such as ``">=1.24,<2"``.

    Only the numbers before the first other character count: 2026.4.1-22982-release is 2026.4.1.

    Raises:
        BackendError: the version does not satisfy it.
        BundleError: the requirement is malformed.
    """
    have = _version(version)
    for part in filter(None, (piece.strip() for piece in requires.split(","))):
        match = re.fullmatch(r"(>=|==|<)\s*(\d+(?:\.\d+)*)", part)
        if match is None:
            raise BundleError(
                f"engine.requires: expected parts like '>=1.24', '==1.24' or '<2', got {part!r}"
            )
        want = _version(match[2])
        width = max(len(have), len(want))
        ours, theirs = (v + (0,) * (width - len(v)) for v in (have, want))
        if not {">=": ours >= theirs, "==": ours == theirs, "<": ours < theirs}[match[1]]:
            raise BackendError(
                f"{name}: expected version {requires}, got {version}",
                hint=f'pip install "{name}{requires}"'
                if " " not in name
                else "Install a version in that range.",
            )


def hash_files(folder: Path) -> dict[str, FileEntry]:
    """SHA-256 and size of every file below ``folder`` except the manifest, keyed by relative POSIX path.

    Raises:
        BundleError: something in it is neither a plain file nor a folder.
    """
    files = {}
    for item in sorted(folder.rglob("*")):
        name = item.relative_to(folder).as_posix()
        if item.is_symlink() or not (item.is_file() or item.is_dir()):
            raise BundleError(f"{name}: a bundle holds only plain files")
        if item.is_file() and name != MANIFEST:
            files[name] = hash_file(item)
    return files


def hash_file(path: Path) -> FileEntry:
    """SHA-256 and size of a file."""
    return FileEntry(_sha256(path, lambda _: None), path.stat().st_size)


def write_manifest(folder: Path, manifest: Manifest) -> None:
    """Write ``cpm_edge.json``; the last file of an export, since its presence makes a folder a bundle."""
    (folder / MANIFEST).write_text(manifest.dumps(), encoding="utf-8", newline="\n")


def cache_folder() -> Path | None:
    """The user's cache folder for this program, or None where there is none."""
    if chosen := os.environ.get("CPM_EDGE_CACHE"):
        return Path(chosen)
    base = os.environ.get("LOCALAPPDATA") if sys.platform == "win32" else os.environ.get("XDG_CACHE_HOME")
    if base:
        return Path(base) / "cpm-edge"
    try:
        return Path.home() / ".cache" / "cpm-edge"
    except RuntimeError:  # a user without a home
        return None


def _missing_hint(folder: Path) -> str:
    old = folder.parent / f".{folder.name}.old"
    if (old / MANIFEST).is_file():
        return f"An interrupted export left the previous bundle in {old}; rename it back or export again."
    return "Make a bundle with: cpm-export --model DIR --target ort|aipc -o BUNDLE"


def _confined(root: Path, name: str) -> Path:
    parts = name.split("/")
    # A colon is a drive letter or an alternate stream on Windows; a backslash is a separator there.
    if not name or any(c in name for c in "\\:\0") or any(part in ("", ".", "..") for part in parts):
        raise BundleError(f"files[{name!r}]: expected a relative path inside the bundle", hint=_UNSAFE)
    path = root.joinpath(*parts)
    if not path.resolve().is_relative_to(root):
        raise BundleError(f"files[{name!r}]: it is a link that leaves the bundle", hint=_UNSAFE)
    return path


_UNSAFE = "Do not use this bundle unless you trust where it comes from; export it again."


def _check_size(path: Path, name: str, entry: FileEntry) -> None:
    if not path.is_file():
        raise BundleError(
            f"{name} is missing from the bundle", hint="Copy the bundle again, or export it again."
        )
    size = path.stat().st_size
    if size != entry.bytes:
        raise BundleError(
            f"{name}: expected {entry.bytes} bytes, got {size}",
            hint="The copy is incomplete: copy the bundle again, or export it again.",
        )


def _check_hashes(root: Path, manifest: Manifest, manifest_hash: str, *, force: bool) -> None:
    before = _fingerprint(root, manifest, manifest_hash)
    memory = cache_folder()
    note = memory and memory / "checked" / f"{hashlib.sha256(os.fsencode(root)).hexdigest()[:32]}.json"
    if note and not force and _recall(note) == before:
        return
    total = sum(entry.bytes for entry in manifest.files.values())
    with _progress(total) as advance:
        for name, entry in manifest.files.items():
            got = _sha256(root / name, advance)
            if got != entry.sha256:
                raise BundleError(
                    f"{name} is damaged: expected SHA-256 {entry.sha256[:16]}..., got {got[:16]}...",
                    hint="Copy the bundle again, or export it again.",
                )
    if note and _fingerprint(root, manifest, manifest_hash) == before:
        _remember(note, before)


def _fingerprint(root: Path, manifest: Manifest, manifest_hash: str) -> str:
    facts: list[object] = [str(root), manifest_hash]
    for name in sorted(manifest.files):
        real = (root / name).resolve()
        stat = real.stat()
        facts.append([str(real), stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns, stat.st_ino])
    return hashlib.sha256(json.dumps(facts).encode()).hexdigest()


def _recall(note: Path) -> str | None:
    try:
        return str(json.loads(note.read_text(encoding="utf-8"))["fingerprint"])
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _remember(note: Path, fingerprint: str) -> None:
    # Remembering only saves time, so a cache folder that cannot be written is no error.
    with contextlib.suppress(OSError):
        note.parent.mkdir(parents=True, exist_ok=True)
        draft = note.with_suffix(f".{os.getpid()}")
        draft.write_text(json.dumps({"fingerprint": fingerprint}), encoding="utf-8")
        draft.replace(note)


def _sha256(path: Path, advance: Callable[[int], None]) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(_BLOCK):
            digest.update(block)
            advance(len(block))
    return digest.hexdigest()


@contextlib.contextmanager
def _progress(total: int) -> Iterator[Callable[[int], None]]:
    if total < _SHOW_PROGRESS_FROM or not sys.stderr.isatty():
        yield lambda _: None
        return
    from rich.console import Console
    from rich.progress import Progress

    with Progress(console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task("Checking the bundle", total=total)
        yield lambda count: bar.advance(task, count)


def _version(text: str) -> tuple[int, ...]:
    match = re.match(r"\d+(?:\.\d+)*", text)
    return tuple(int(number) for number in match[0].split(".")) if match else ()
