"""Engines built on this machine, in the user's cache folder: ``engines/KEY/engine.plan`` and its facts.

KEY hashes the bundle's checksum and the versions an engine depends on, so an upgrade of TensorRT, another GPU
or another plugin finds nothing and builds again. ``engine.json`` repeats them in words, for people and for
the check before an engine is opened; it is written last, so a folder without it holds no engine.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cpm_edge.runtimes.bundle import Bundle, cache_folder, hash_file
from cpm_edge.runtimes.errors import BackendError
from cpm_edge.runtimes.manifest import checksum
from cpm_edge.runtimes.onnx_wire import ExternalTensor
from cpm_edge.runtimes.tensorrt.memory import Placement

PLAN = "engine.plan"
FACTS = "engine.json"


@dataclass(frozen=True)
class EngineIdentity:
    """What an engine is for; it runs where all of these are equal.

    Attributes:
        bundle: the manifest's checksum; engine: "tensorrt" or "tensorrt_rtx"; version: of it.
        sm: compute capability; plugins: version of the plugin library, None without plugins.
    """

    bundle: str
    engine: str
    version: str
    sm: int
    plugins: str | None

    @property
    def key(self) -> str:
        facts = json.dumps(dataclasses.asdict(self), sort_keys=True)
        return hashlib.sha256(facts.encode()).hexdigest()[:32]


@dataclass(frozen=True)
class CachedEngine:
    """An engine file and what it is.

    Attributes:
        placement: where its weights are; weights: those that are inputs, in the order of the graph.
        seconds: that the build took.
    """

    path: Path
    identity: EngineIdentity
    placement: Placement
    weights: tuple[ExternalTensor, ...]
    sha256: str
    nbytes: int
    seconds: float

    def intact(self) -> bool:
        """Whether the file is, byte for byte, the one that was built."""
        entry = hash_file(self.path)
        return (entry.sha256, entry.bytes) == (self.sha256, self.nbytes)


def identity_of(bundle: Bundle, version: str, sm: int) -> EngineIdentity:
    """What an engine of this bundle must be for here."""
    engine = bundle.manifest.engine
    plugins = engine.get("plugins")
    return EngineIdentity(
        checksum(bundle.manifest.to_json()),
        engine["name"],
        version,
        sm,
        plugins and str(plugins["version"]),
    )


class EngineCache:
    """The engines of this user."""

    def __init__(self) -> None:
        root = cache_folder()
        if root is None:
            raise BackendError(
                "there is no folder for engines: this user has no home",
                hint="Name one in the environment variable CPM_EDGE_CACHE.",
            )
        self.folder = root / "engines"

    def find(self, identity: EngineIdentity) -> CachedEngine | None:
        """The engine built for this identity, None if there is none that is whole.

        Raises:
            BackendError: one lies there that was built for something else.
        """
        folder = self.folder / identity.key
        try:
            facts = json.loads((folder / FACTS).read_text(encoding="utf-8"))
            found = _from_facts(folder, facts)
            size = found.path.stat().st_size
        except (OSError, ValueError, KeyError, TypeError):
            return None
        check_identity(found.identity, identity, str(found.path))
        return found if size == found.nbytes else None

    def timings(self, identity: EngineIdentity) -> Path:
        """File with what the builder measured on this GPU with this version; for all bundles."""
        return self.folder / f"timings-{identity.engine}-{identity.version}-sm{identity.sm}.cache"

    def store(
        self,
        identity: EngineIdentity,
        plan: memoryview,
        placement: Placement,
        weights: tuple[ExternalTensor, ...],
        seconds: float,
    ) -> CachedEngine:
        """Write an engine whole; an older one of the same identity is replaced.

        Raises:
            BackendError: the folder cannot be written.
        """
        folder = self.folder / identity.key
        with self.writing():
            folder.mkdir(parents=True, exist_ok=True)
            (folder / FACTS).unlink(missing_ok=True)
            _write(folder / PLAN, plan)
            entry = hash_file(folder / PLAN)
            facts = {
                **dataclasses.asdict(identity),
                "placement": placement.value,
                "weights": [dataclasses.asdict(weight) for weight in weights],
                "sha256": entry.sha256,
                "bytes": entry.bytes,
                "seconds": round(seconds, 1),
            }
            _write(folder / FACTS, memoryview(json.dumps(facts, indent=2).encode()))
        return _from_facts(folder, facts)

    @contextlib.contextmanager
    def writing(self) -> Iterator[None]:
        """Turn a failure to write below the folder into an error with a way out."""
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            yield
        except OSError as error:
            raise BackendError(
                f"the engine cannot be kept in {self.folder}: {error.strerror or error}",
                hint="Free some space, or name another folder in the environment variable CPM_EDGE_CACHE.",
            ) from error


def check_identity(found: EngineIdentity, here: EngineIdentity, what: str) -> None:
    """Refuse an engine that was built for something else.

    Raises:
        BackendError: naming both, and the command that builds one for this machine.
    """
    labels = {
        "engine": "engine",
        "version": f"{here.engine} version",
        "sm": "compute capability (SM)",
        "plugins": "plugin version",
        "bundle": "bundle",
    }
    differing = [
        f"{label} {getattr(found, name)} there, {getattr(here, name)} here"
        for name, label in labels.items()
        if getattr(found, name) != getattr(here, name)
    ]
    if differing:
        raise BackendError(
            f"the engine {what} was built for something else: {'; '.join(differing)}",
            hint="Build it for this machine: cpm-run BUNDLE --build-only",
        )


def _from_facts(folder: Path, facts: dict[str, Any]) -> CachedEngine:
    names = [field.name for field in dataclasses.fields(EngineIdentity)]
    weights = [{**weight, "dims": tuple(weight["dims"])} for weight in facts["weights"]]
    return CachedEngine(
        path=folder / PLAN,
        identity=EngineIdentity(**{name: facts[name] for name in names}),
        placement=Placement(facts["placement"]),
        weights=tuple(ExternalTensor(**weight) for weight in weights),
        sha256=facts["sha256"],
        nbytes=facts["bytes"],
        seconds=facts["seconds"],
    )


def _write(path: Path, data: memoryview) -> None:
    draft = path.with_name(f"{path.name}.{os.getpid()}")
    try:
        with draft.open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        draft.replace(path)
    finally:
        draft.unlink(missing_ok=True)
