"""``cpm_edge.json``: what a bundle says about itself.

Read with hand-written checks, so that an error names the key: ``files["model.onnx"].bytes: expected ...``.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import re
from dataclasses import dataclass, field
from typing import Any

from cpm_edge.runtimes.errors import BundleError

MANIFEST = "cpm_edge.json"
FORMAT_VERSION = 1
CHECKSUM = "checksum"

_SHA256 = re.compile(r"[0-9a-f]{64}")
_JSON_NAMES = {
    dict: "an object", list: "an array", str: "a string", int: "an integer", float: "a number",
    bool: "true or false", type(None): "null",
}  # fmt: skip


def checksum(data: dict[str, Any]) -> str:
    """SHA-256 of a manifest's values: of everything but the checksum itself and the format version."""
    values = {key: value for key, value in data.items() if key not in (CHECKSUM, "format_version")}
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()


def check_checksum(text: str | bytes) -> None:
    """Refuse a manifest that was changed after it was written.

    Raises:
        BundleError: the checksum is missing or another.
    """
    data = json.loads(text)
    if data.get(CHECKSUM) != checksum(data):
        raise BundleError(
            f"{MANIFEST} was changed or damaged: its {CHECKSUM} does not fit its contents",
            hint="Copy the bundle again, or export it again.",
        )


@dataclass(frozen=True)
class FileEntry:
    """One file of the bundle: its SHA-256 (64 lower-case hex digits) and its size in bytes."""

    sha256: str
    bytes: int

    def to_json(self) -> dict[str, Any]:
        return {"sha256": self.sha256, "bytes": self.bytes}

    @classmethod
    def from_json(cls, value: object, where: str) -> FileEntry:
        entry = _take(value, dict, where)
        sha256 = _take(entry.get("sha256"), str, f"{where}.sha256")
        if not _SHA256.fullmatch(sha256):
            raise BundleError(f"{where}.sha256: expected 64 lower-case hex digits, got {sha256!r}")
        return cls(sha256, _count(entry.get("bytes"), f"{where}.bytes", least=0))


@dataclass(frozen=True)
class ContextLimits:
    """How long a sequence may get.

    Attributes:
        max_context: tokens that caches and rotary tables were exported for.
        dense_len: from this length on attention is sparse; None when it is always dense.
        trained_context: the checkpoint's own limit, if its config states one.
        rope: what the export fixed of a length-dependent RoPE (type, list, base), for the record.
    """

    max_context: int
    dense_len: int | None = None
    trained_context: int | None = None
    rope: dict[str, Any] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        return dataclasses.asdict(self)

    @classmethod
    def from_json(cls, value: object, where: str) -> ContextLimits:
        limits = _take(value, dict, where)
        return cls(
            max_context=_count(limits.get("max_context"), f"{where}.max_context", least=1),
            dense_len=_optional_count(limits.get("dense_len"), f"{where}.dense_len"),
            trained_context=_optional_count(limits.get("trained_context"), f"{where}.trained_context"),
            rope=_take(limits.get("rope", {}), dict, f"{where}.rope"),
        )


@dataclass(frozen=True)
class Manifest:
    """The contract between exporter and runtime.

    Attributes:
        producer: name and version of the program that wrote the bundle.
        target: "ort", "aipc", "jetson" or "rtx"; chip: the chip id asked for, or None.
        flavour: which graphs it holds ("native", "stock", "both"), None where a target has only one.
        source: the checkpoint (name, revision, hash).
        weights: weight format per tensor class; ops: operators beyond the engine's own, with versions.
        cache: layout of the KV cache (form, names, shapes, dtypes); attention: its parameters.
        engine: {"name", "version" (exported with), "requires" (a specifier for check_engine)}.
        files: every other file of the folder, by relative POSIX path.
        verification: result of ``cpm-export --verify``, None when it did not run.
        extra: top-level keys that this version does not know; kept as they are.
    """

    producer: str
    target: str
    architecture: str
    vocab_size: int
    hidden_size: int
    num_layers: int
    context: ContextLimits
    engine: dict[str, Any]
    files: dict[str, FileEntry]
    source: dict[str, Any] = field(default_factory=dict)
    weights: dict[str, Any] = field(default_factory=dict)
    ops: list[dict[str, Any]] = field(default_factory=list)
    cache: dict[str, Any] = field(default_factory=dict)
    attention: dict[str, Any] = field(default_factory=dict)
    chip: str | None = None
    flavour: str | None = None
    verification: dict[str, Any] | None = None
    format_version: int = FORMAT_VERSION
    extra: dict[str, Any] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        """A JSON-ready dict, the format version first and the long file list last."""
        plain = {f.name: getattr(self, f.name) for f in dataclasses.fields(self) if f.name != "extra"}
        plain["context"] = self.context.to_json()
        plain["files"] = {name: entry.to_json() for name, entry in sorted(self.files.items())}
        ends = ("format_version", "files")
        middle = {key: value for key, value in plain.items() if key not in ends}
        return {"format_version": self.format_version, **middle, **self.extra, "files": plain["files"]}

    def dumps(self) -> str:
        """The text of ``cpm_edge.json``, with a checksum of itself."""
        data = self.to_json()
        data = {"format_version": data.pop("format_version"), CHECKSUM: checksum(data), **data}
        return json.dumps(data, indent=2, ensure_ascii=False) + "\n"

    @classmethod
    def from_json(cls, value: object) -> Manifest:
        """Check and take over a parsed manifest.

        Raises:
            BundleError: newer format version, or a key that is missing or of the wrong type.
        """
        data = _take(value, dict, "top level")
        version = _check_version(data.get("format_version"))
        files = _take(data.get("files"), dict, "files")
        ops = _take(data.get("ops", []), list, "ops")
        verification = data.get("verification")
        known = {f.name for f in dataclasses.fields(cls)}
        return cls(
            format_version=version,
            producer=_take(data.get("producer"), str, "producer"),
            target=_take(data.get("target"), str, "target"),
            chip=_optional_text(data.get("chip"), "chip"),
            flavour=_optional_text(data.get("flavour"), "flavour"),
            source=_take(data.get("source", {}), dict, "source"),
            architecture=_take(data.get("architecture"), str, "architecture"),
            vocab_size=_count(data.get("vocab_size"), "vocab_size", least=1),
            hidden_size=_count(data.get("hidden_size"), "hidden_size", least=1),
            num_layers=_count(data.get("num_layers"), "num_layers", least=1),
            weights=_take(data.get("weights", {}), dict, "weights"),
            ops=[_take(op, dict, f"ops[{i}]") for i, op in enumerate(ops)],
            cache=_take(data.get("cache", {}), dict, "cache"),
            context=ContextLimits.from_json(data.get("context"), "context"),
            attention=_take(data.get("attention", {}), dict, "attention"),
            engine=_engine(data.get("engine")),
            files={name: FileEntry.from_json(entry, f'files["{name}"]') for name, entry in files.items()},
            verification=None if verification is None else _take(verification, dict, "verification"),
            extra={key: item for key, item in data.items() if key not in known and key != CHECKSUM},
        )

    @classmethod
    def loads(cls, text: str | bytes) -> Manifest:
        """Parse the text of ``cpm_edge.json``; see from_json."""
        try:
            value = json.loads(text)
        except (ValueError, RecursionError) as error:
            raise BundleError(
                f"{MANIFEST} is not valid JSON: {error}", hint="Export the bundle again."
            ) from error
        return cls.from_json(value)


def _check_version(value: object) -> int:
    version = _count(value, "format_version", least=1)
    if version > FORMAT_VERSION:
        raise BundleError(
            f"the bundle has format version {version}; this cpm-edge reads up to {FORMAT_VERSION}",
            hint="Upgrade with: pip install --upgrade cpm-edge",
        )
    return version


def _engine(value: object) -> dict[str, Any]:
    engine: dict[str, Any] = _take(value, dict, "engine")
    for key in ("name", "version", "requires"):
        _take(engine.get(key), str, f"engine.{key}")
    return engine


def _take(value: object, kind: type, where: str) -> Any:
    # bool is an int in Python, not in JSON.
    if not isinstance(value, kind) or (kind is int and isinstance(value, bool)):
        got = _JSON_NAMES.get(type(value), type(value).__name__) if value is not None else "nothing"
        raise BundleError(
            f"{MANIFEST}: {where}: expected {_JSON_NAMES[kind]}, got {got}", hint="Export the bundle again."
        )
    return value


def _count(value: object, where: str, *, least: int) -> int:
    number: int = _take(value, int, where)
    if number < least:
        raise BundleError(f"{MANIFEST}: {where}: expected at least {least}, got {number}")
    return number


def _optional_count(value: object, where: str) -> int | None:
    return None if value is None else _count(value, where, least=0)


def _optional_text(value: object, where: str) -> str | None:
    return None if value is None else _take(value, str, where)
