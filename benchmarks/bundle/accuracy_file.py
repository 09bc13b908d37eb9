"""The JSON of ``cpm-bench accuracy``, read again for a report of the bundle that it scored."""

from __future__ import annotations

import hashlib
import json
import math
from pathlib import Path
from typing import Any

from cpm_edge.benchmarks.bundle.record import is_text
from cpm_edge.benchmarks.errors import BenchError
from cpm_edge.benchmarks.report import SCHEMA
from cpm_edge.runtimes.manifest import Manifest

_NUMBERS = ("perplexity", "reference_perplexity", "kl", "top1", "tokens")
_TEXTS = ("reference", "text")
HINT = "cpm-bench accuracy BUNDLE --reference CHECKPOINT --text FILE --json FILE writes one"


def scored_bundle(manifest: Manifest) -> dict[str, str]:
    """The bundle, and in the manifest's words what its accuracy depends on."""
    files = " ".join(f"{name} {entry.sha256}" for name, entry in sorted(manifest.files.items()))
    weights = {f"{kind} weights": str(manifest.weights[kind]) for kind in ("linear", "embedding", "head")}
    return {
        "source": str(manifest.source["name"]),
        "target": manifest.target,
        "flavour": manifest.flavour or "",
        **weights,
        "activations": str(manifest.weights["activations"]),
        "cache": str(manifest.cache["dtype"]),
        "attention": "sparse" if manifest.attention["sparse"] else "dense",
        "files": hashlib.sha256(files.encode()).hexdigest()[:12],
    }


def read_accuracy(file: Path, manifest: Manifest) -> dict[str, Any]:
    """The results, checked.

    Raises:
        BenchError: another kind of file, of a newer schema, damaged, or of another bundle.
    """
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise BenchError(f"{file}: expected the JSON of cpm-bench accuracy: {error}", hint=HINT) from error
    if not isinstance(content, dict) or content.get("benchmark") != "accuracy":
        raise BenchError(f"{file}: expected the JSON of cpm-bench accuracy", hint=HINT)
    schema, found = content.get("schema"), content.get("results")
    if isinstance(schema, int) and schema > SCHEMA:
        raise BenchError(
            f"{file}: schema {schema} is newer than this version reads ({SCHEMA})",
            hint="upgrade: pip install --upgrade cpm-edge",
        )
    if not isinstance(found, dict):
        raise _damaged(file, "results", "an object", found)
    _check_values(file, found)
    ours, theirs = scored_bundle(manifest), found.get("bundle")
    if not isinstance(theirs, dict):
        raise _damaged(file, "results.bundle", "what was scored", theirs)
    other = [f"{key} {ours[key]}, got {theirs.get(key)}" for key in ours if theirs.get(key) != ours[key]]
    if other:
        raise BenchError(f"{file}: expected the accuracy of this bundle: {'; '.join(other)}", hint=HINT)
    return found


def _check_values(file: Path, found: dict[str, Any]) -> None:
    for key in _NUMBERS:
        value = found.get(key)
        # Rounding leaves a divergence of 0 a hair below it.
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not -1e-3 < value < math.inf:
            raise _damaged(file, f"results.{key}", "a number from 0 on", value)
    greedy = found.get("greedy")
    texts = {f"results.{key}": found.get(key) for key in _TEXTS}
    texts["results.greedy.summary"] = greedy.get("summary") if isinstance(greedy, dict) else None
    for key, value in texts.items():
        if not is_text(value):
            raise _damaged(file, key, "text", value)


def _damaged(file: Path, key: str, expected: str, got: Any) -> BenchError:
    text = repr(got)
    return BenchError(
        f"{file}: {key}: expected {expected}, got {text if len(text) < 60 else text[:57] + '...'}", hint=HINT
    )
