"""The record of a ``cpm-bench run``: one JSON file, written here, read and checked by whatever reports it.

``schema`` 1. Keys: ``benchmark`` ("run"), ``command``, ``time``, ``machine``, ``versions``, ``settings`` and
``notes`` as in every report, and ``results``:

    bundle      name, target, flavour, architecture, weights, layers, max_context, cache, sparse, producer,
                files (bytes by name), card
    chip        id, name
    load_seconds, engine, conditions, memory      see measure
    contexts    one a prompt length: context, first_token_seconds, step_seconds (a list a repeat),
                output_hashes, cache_bytes, read_bytes, predicted (tokens a second),
                predicted_first_token (seconds)
    roofline    bandwidth (bytes a second) and its source
    accuracy    the results of ``cpm-bench accuracy --json``, or null
"""

from __future__ import annotations

import json
import unicodedata
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cpm_edge.benchmarks.errors import BenchError
from cpm_edge.benchmarks.report import SCHEMA
from cpm_edge.benchmarks.samples import Samples

_TYPES: dict[str, type | tuple[type, ...]] = {
    "machine": dict,
    "versions": dict,
    "settings": dict,
    "notes": list,
    "results": dict,
    "command": list,
    "time": str,
}
_RESULTS: dict[str, type | tuple[type, ...]] = {
    "bundle": dict,
    "chip": dict,
    "contexts": list,
    "memory": dict,
    "roofline": dict,
    "conditions": dict,
    "load_seconds": (int, float),
}
MOST_TOKENS = 10_000_000
UNPRINTABLE = ("Cc", "Cs", "Zl", "Zp")  # control characters, halves of pairs, ends of lines and paragraphs


@dataclass(frozen=True)
class At:
    """What was measured with a prompt of one length.

    Attributes:
        first: seconds to the first token, one a repeat.
        rate: decoded tokens a second without the first, one a repeat.
        steps: milliseconds of every step of every repeat.
        ceiling: tokens a second that the roofline allows, None without one.
        predicted: (low, high) tokens a second by the chip's profile; low may be None.
        predicted_first: (low, high) seconds to the first token.
    """

    context: int
    first: Samples
    rate: Samples
    steps: list[float]
    hashes: list[str]
    ceiling: float | None
    predicted: tuple[float | None, float] | None
    predicted_first: tuple[float | None, float] | None

    @property
    def share(self) -> float | None:
        return self.rate.median / self.ceiling if self.ceiling else None

    @property
    def step(self) -> Samples:
        """Milliseconds an output token, the first left out (TPOT), one a repeat."""
        return Samples(1e3 / rate for rate in self.rate.values)

    @property
    def prefill_rate(self) -> Samples:
        return Samples(self.context / seconds for seconds in self.first.values)


@dataclass(frozen=True)
class Record:
    """A checked file.

    Attributes:
        content: all of it.
        name: of the file, for legends.
    """

    content: dict[str, Any]
    name: str

    @property
    def results(self) -> dict[str, Any]:
        found: dict[str, Any] = self.content["results"]
        return found

    @property
    def label(self) -> str:
        """Model, target, flavour and format in a few words."""
        bundle = self.results["bundle"]
        flavour = f" {bundle['flavour']}" if bundle.get("flavour") else ""
        return f"{bundle['name']} · {bundle['target']}{flavour} · {bundle['weights']}"

    def at(self) -> Iterator[At]:
        """By context, ascending."""
        bandwidth = self.results["roofline"].get("bandwidth")
        for entry in sorted(self.results["contexts"], key=lambda each: each["context"]):
            steps = entry["step_seconds"]
            yield At(
                context=entry["context"],
                first=Samples(entry["first_token_seconds"]),
                rate=Samples(len(each) / sum(each) for each in steps),
                steps=[1e3 * step for each in steps for step in each],
                hashes=entry["output_hashes"],
                ceiling=bandwidth / entry["read_bytes"] if bandwidth else None,
                predicted=_pair(entry.get("predicted")),
                predicted_first=_pair(entry.get("predicted_first_token")),
            )


def read_record(path: Path) -> Record:
    """Read a record that a run wrote.

    Raises:
        BenchError: no JSON, of a newer schema, of another benchmark, or damaged; the message names the key.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise BenchError(
            f"{path}: expected the JSON of cpm-bench run: {error}",
            hint="cpm-bench run BUNDLE --json writes one",
        ) from error
    return check_record(content, str(path))


def check_record(content: Any, where: str) -> Record:
    """The same for a parsed document."""
    if not isinstance(content, dict) or content.get("benchmark") != "run":
        got = content.get("benchmark") if isinstance(content, dict) else type(content).__name__
        raise _damaged(where, "benchmark", "'run'", got)
    schema = content.get("schema")
    if not isinstance(schema, int) or isinstance(schema, bool) or schema < 1:
        raise _damaged(where, "schema", "a whole number", schema)
    if schema > SCHEMA:
        raise BenchError(
            f"{where}: schema {schema} is newer than this version reads ({SCHEMA})",
            hint="upgrade: pip install --upgrade cpm-edge",
        )
    _check_types(content, _TYPES, where, "")
    _check_types(content["results"], _RESULTS, where, "results.")
    if not content["results"]["contexts"]:
        raise _damaged(where, "results.contexts", "at least one", [])
    for number, entry in enumerate(content["results"]["contexts"]):
        _check_context(entry, where, f"results.contexts[{number}]")
    bandwidth = content["results"]["roofline"].get("bandwidth")
    if bandwidth is not None and not _times([bandwidth]):
        raise _damaged(where, "results.roofline.bandwidth", "null or a number above 0", bandwidth)
    for key, value in content["results"]["memory"].items():
        if key != "predicted" and value is not None and not _whole(value, 0):
            raise _damaged(where, f"results.memory.{key}", "bytes", value)
    for part, keys in (("bundle", ("name", "target", "weights")), ("chip", ("id", "name"))):
        for key in keys:
            value = content["results"][part].get(key)
            if not is_text(value):
                raise _damaged(where, f"results.{part}.{key}", "printable text", value)
    for part, values in (("notes", content["notes"]), ("command", content["command"])):
        if not all(map(is_text, values)):
            raise _damaged(where, part, "a list of printable texts", values)
    flavour = content["results"]["bundle"].get("flavour")
    if flavour is not None and not is_text(flavour):
        raise _damaged(where, "results.bundle.flavour", "null or printable text", flavour)
    return Record(content, Path(where).stem)


def _check_types(
    content: dict[str, Any], types: dict[str, type | tuple[type, ...]], where: str, prefix: str
) -> None:
    for key, kind in types.items():
        value = content.get(key)
        if not isinstance(value, kind) or isinstance(value, bool):
            names = kind.__name__ if isinstance(kind, type) else "a number"
            raise _damaged(where, prefix + key, names, value)


def _check_context(entry: Any, where: str, key: str) -> None:
    if not isinstance(entry, dict):
        raise _damaged(where, key, "an object", entry)
    if not _whole(entry.get("context"), 1, MOST_TOKENS):
        raise _damaged(where, f"{key}.context", "a number of tokens", entry.get("context"))
    first, steps = entry.get("first_token_seconds"), entry.get("step_seconds")
    if not _times(first):
        raise _damaged(where, f"{key}.first_token_seconds", "seconds above 0", first)
    if not isinstance(steps, list) or not steps or not all(_times(each) for each in steps):
        raise _damaged(where, f"{key}.step_seconds", "a list of seconds a repeat", steps)
    if not _times([entry.get("read_bytes")]):
        raise _damaged(where, f"{key}.read_bytes", "a number above 0", entry.get("read_bytes"))
    hashes = entry.get("output_hashes")
    if not isinstance(hashes, list) or not all(map(is_text, hashes)):
        raise _damaged(where, f"{key}.output_hashes", "a list of printable texts", hashes)
    for name in ("predicted", "predicted_first_token"):
        if not _is_interval(entry.get(name)):
            raise _damaged(where, f"{key}.{name}", "null, or low and high", entry.get(name))


def _is_interval(value: Any) -> bool:
    return value is None or (
        isinstance(value, dict)
        and "low" in value
        and _times([value.get("high")])
        and (value["low"] is None or _times([value["low"]]))
    )


def _pair(interval: dict[str, float] | None) -> tuple[float | None, float] | None:
    return (interval["low"], interval["high"]) if interval else None


def _times(values: Any) -> bool:
    return (
        isinstance(values, list)
        and bool(values)
        and all(isinstance(v, (int, float)) and not isinstance(v, bool) and 1e-9 < v < 1e18 for v in values)
    )


def _whole(value: Any, least: int, most: int = 1 << 60) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and least <= value <= most


def is_text(value: Any) -> bool:
    """Nothing that moves a terminal's cursor or that UTF-8 does not have."""
    return isinstance(value, str) and not any(unicodedata.category(each) in UNPRINTABLE for each in value)


def _damaged(where: str, key: str, expected: str, got: Any) -> BenchError:
    text = repr(got)
    return BenchError(
        f"{where}: {key}: expected {expected}, got {text if len(text) < 60 else text[:57] + '...'}",
        hint="the file was changed or cut off; measure again with cpm-bench run --json",
    )
