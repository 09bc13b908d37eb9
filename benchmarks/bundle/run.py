"""``cpm-bench run``: measures a bundle and puts it beside its chip's roofline and predictions."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from rich.table import Table

from cpm_edge.benchmarks.bundle.measure import Settings, measure
from cpm_edge.benchmarks.bundle.record import Record, check_record
from cpm_edge.benchmarks.errors import BenchError
from cpm_edge.benchmarks.plan import Chip, PlanError, detect
from cpm_edge.benchmarks.plan import chip as find_chip
from cpm_edge.benchmarks.plan.cache import cache_bytes, read_bytes
from cpm_edge.benchmarks.plan.memory import device_memory
from cpm_edge.benchmarks.plan.shape import ModelShape
from cpm_edge.benchmarks.plan.speed import OTHER_FLAVOUR, decode
from cpm_edge.benchmarks.plan.storage import Format, Formats, weight_bytes
from cpm_edge.benchmarks.report import Report
from cpm_edge.exporter.progress import Progress
from cpm_edge.plugins.native import NativeError
from cpm_edge.plugins.probe import read_bandwidth
from cpm_edge.runtimes.bundle import Bundle, open_bundle

SLOW = 0.7  # of a profile's bandwidth, or the other way round
DRIFT = 0.1  # of the bandwidth, from before to after a measurement, of which a report speaks
_CACHE = {"float32": "fp32", "float16": "fp16", "int8": "int8", "uint8": "int8"}


def run(path: Path, settings: Settings, chip: str, accuracy: Path | None) -> tuple[Report, Record]:
    """Measure; the report's JSON is the record.

    Args:
        chip: an id, or auto.
        accuracy: JSON of ``cpm-bench accuracy`` on the same bundle.

    Raises:
        BenchError: a chip, a context or an accuracy file that does not fit.
    """
    bundle = open_bundle(path)
    found = _chip(chip)
    exact = _accuracy(accuracy, bundle)
    with Progress().stage(f"Measuring {path.name}"):
        bandwidths = [_read_bandwidth(settings)]
        results = measure(path, settings)
        bandwidths.append(_read_bandwidth(settings))
    notes = results.pop("notes")
    results["bundle"] = _bundle(bundle, path)
    results["roofline"] = _roofline(found, bandwidths)
    results["chip"] = {"id": found.id, "name": found.name}
    results["accuracy"] = exact
    notes += add_model(results, bundle, found, settings)
    notes += _drift(bandwidths) + _other_memory(results["roofline"], found, settings)
    report = Report("run", {**vars(settings), "bundle": str(path), "chip": found.id}, results, notes=notes)
    record = check_record(json.loads(json.dumps(report.to_json())), path.name)
    report.tables.append(table(record))
    return report, record


def add_model(results: dict[str, Any], bundle: Bundle, chip: Chip, settings: Settings) -> list[str]:
    """Put bytes a token reads, predictions and the predicted memory into ``results``; notes on them."""
    manifest = bundle.manifest
    shape = ModelShape.read(json.loads(bundle.file("config.json").read_text(encoding="utf-8")))
    shape = shape.with_attention("sparse" if manifest.attention["sparse"] else "dense")
    formats = _formats(manifest.weights)
    flavour, form = manifest.flavour or "", _CACHE[manifest.cache["dtype"]]
    weights = weight_bytes(shape, formats, manifest.target, flavour)
    known = chip.devices.get(settings.device, next(iter(chip.devices.values())))
    ceiling = OTHER_FLAVOUR if settings.device == "CPU" and flavour != "native" else ""
    notes: list[str] = []
    for entry in results["contexts"]:
        middle = entry["context"] + settings.new_tokens // 2
        entry["read_bytes"] = weights.read + read_bytes(shape, middle, form, manifest.target)
        guess = decode(shape, weights.read, middle, form, chip, known, ceiling=ceiling)
        entry["predicted"] = vars(guess.rate) if guess.rate else None
        notes += [guess.note] if guess.note and guess.note not in notes else []
        if len(entry["output_hashes"]) > 1:
            notes.append(f"repeats at {entry['context']} tokens gave different outputs")
    longest = max(settings.contexts) + settings.new_tokens
    cache = cache_bytes(shape, longest, manifest.target, flavour, form)
    memory = device_memory(shape, weights, cache, manifest.target, flavour, settings.device)
    results["memory"]["predicted"] = {**vars(memory), "total": memory.total}
    return notes


def _formats(weights: dict[str, Any]) -> Formats:
    return Formats(*(parse_format(weights[kind]) for kind in ("linear", "embedding", "head")))


def parse_format(text: str) -> Format:
    """From a manifest's description: ``int4 g32 sym``, ``int8 row sym``, ``bf16``."""
    parts = text.split()
    group = next((int(part[1:]) for part in parts[1:] if part[0] == "g" and part[1:].isdigit()), 0)
    return Format(parts[0], group, "asym" not in parts)


def _chip(name: str) -> Chip:
    try:
        return detect() if name == "auto" else find_chip(name)
    except PlanError as error:
        raise BenchError(error.message, hint=error.hint) from error


def _bundle(bundle: Bundle, path: Path) -> dict[str, Any]:
    manifest = bundle.manifest
    try:
        card = bundle.file("README.md").read_text(encoding="utf-8")
    except OSError:
        card = ""
    return {
        "name": path.resolve().name,
        "target": manifest.target,
        "flavour": manifest.flavour,
        "architecture": manifest.architecture,
        "weights": manifest.weights["linear"],
        "layers": manifest.num_layers,
        "max_context": manifest.context.max_context,
        "cache": manifest.cache["dtype"],
        "sparse": manifest.attention["sparse"],
        "producer": manifest.producer,
        "files": {name: entry.bytes for name, entry in manifest.files.items()},
        "card": card,
    }


def _read_bandwidth(settings: Settings) -> float:
    """Bytes a second; 0 where this process cannot measure what the device reads."""
    if settings.device != "CPU":
        return 0.0
    try:
        return read_bandwidth(settings.threads or _cores())
    except NativeError:
        return 0.0


def _roofline(chip: Chip, bandwidths: list[float]) -> dict[str, Any]:
    """Read bandwidth on the CPU, the mean of before and after the measurement; the chip's peak elsewhere."""
    if all(bandwidths):
        source = "reads of 1 GiB before and after the measurement"
        return {"bandwidth": sum(bandwidths) / len(bandwidths), "source": source}
    if chip.bandwidth is None:
        return {"bandwidth": None, "source": "unverified"}
    return {"bandwidth": chip.bandwidth.value, "source": chip.bandwidth.source}


def _drift(bandwidths: list[float]) -> list[str]:
    """Said where the machine changed meanwhile, as virtual ones do: one run's spread is then too small."""
    low, high = min(bandwidths), max(bandwidths)
    if not low or high - low <= DRIFT * high:
        return []
    before, after = (f"{each / 1e9:.1f}" for each in bandwidths)
    return [
        f"memory was read at {before} GB/s before the measurement and at {after} after it: "
        "this machine's speed changes, and another run may differ by more than the spread"
    ]


def _other_memory(roofline: dict[str, Any], chip: Chip, settings: Settings) -> list[str]:
    """Said where predictions are for a machine that is faster or slower than this one is now."""
    now, known = roofline["bandwidth"], chip.bandwidth
    if settings.device != "CPU" or not now or known is None or SLOW < now / known.value < 1 / SLOW:
        return []
    return [
        f"memory was read at {now / 1e9:.1f} GB/s in this run, the chip's profile says "
        f"{known.value / 1e9:.1f}: predictions are for the latter"
    ]


def _cores() -> int:
    return os.cpu_count() or 1


def _accuracy(file: Path | None, bundle: Bundle) -> dict[str, Any] | None:
    if file is None:
        return None
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
        found: dict[str, Any] = content["results"]
        if content["benchmark"] != "accuracy":
            raise KeyError("benchmark")
        theirs = tuple(map(found.get, ("source", "weights")))
    except (OSError, ValueError, RecursionError, KeyError, TypeError, AttributeError) as error:
        raise BenchError(
            f"{file}: expected the JSON of cpm-bench accuracy",
            hint="cpm-bench accuracy BUNDLE --reference CHECKPOINT --text FILE --json FILE writes one",
        ) from error
    ours = (bundle.manifest.source["name"], bundle.manifest.weights["linear"])
    if theirs != ours:
        raise BenchError(
            f"{file}: expected the accuracy of this bundle, {' in '.join(ours)}, "
            f"got that of {' in '.join(map(str, theirs))}"
        )
    return found


def table(record: Record) -> Table:
    """What a terminal gets."""
    found = Table(
        "context", "first token, s", "prefill, tok/s", "TPOT, ms", "decode, tok/s", "of roofline", "output",
        title=record.label,
    )  # fmt: skip
    for at in record.at():
        found.add_row(
            str(at.context),
            at.first.text(3),
            at.prefill_rate.text(),
            f"{1e3 / at.rate.median:.1f}",
            at.rate.text(),
            "-" if at.share is None else f"{at.share:.0%}",
            ", ".join(at.hashes),
        )
    return found
