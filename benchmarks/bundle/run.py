"""``cpm-bench run``: measures a bundle and puts it beside its chip's roofline and predictions."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from rich.table import Table

from cpm_edge.benchmarks.bundle.accuracy_file import read_accuracy
from cpm_edge.benchmarks.bundle.facts import share
from cpm_edge.benchmarks.bundle.measure import Settings, measure
from cpm_edge.benchmarks.bundle.record import Record, check_record, is_text
from cpm_edge.benchmarks.bundle.verdict import unsteady
from cpm_edge.benchmarks.bundle.yardstick import (
    another_chip,
    bandwidth_now,
    crowded,
    drift,
    find_chip,
    find_device,
    other_memory,
    roofline,
)
from cpm_edge.benchmarks.errors import BenchError
from cpm_edge.benchmarks.plan import Chip
from cpm_edge.benchmarks.plan.cache import cache_bytes, place, read_bytes
from cpm_edge.benchmarks.plan.memory import device_memory
from cpm_edge.benchmarks.plan.shape import ModelShape
from cpm_edge.benchmarks.plan.speed import OTHER_FLAVOUR, decode, first_token
from cpm_edge.benchmarks.plan.storage import Format, Formats, weight_bytes
from cpm_edge.benchmarks.report import Report
from cpm_edge.exporter.progress import Progress
from cpm_edge.runtimes.bundle import Bundle, open_bundle

_CACHE = {"float32": "fp32", "float16": "fp16", "int8": "int8", "uint8": "int8"}


def run(path: Path, settings: Settings, chip: str, accuracy: Path | None) -> tuple[Report, Record]:
    """Measure; the report's JSON is the record.

    Args:
        chip: an id, auto or this-machine.
        accuracy: JSON of ``cpm-bench accuracy`` on the same bundle.

    Raises:
        BenchError: a chip, a context or an accuracy file that does not fit.
    """
    bundle = open_bundle(path)
    if not is_text(path.resolve().name):
        raise BenchError(
            f"{path.resolve().name!r}: expected a folder whose name can be printed", hint="rename it"
        )
    found = find_chip(chip, settings.device)
    exact = read_accuracy(accuracy, bundle.manifest) if accuracy else None
    with Progress().stage(f"Measuring {path.resolve().name}, {settings.length}"):
        bandwidths = [bandwidth_now(settings)]
        results = measure(path, settings)
        bandwidths.append(bandwidth_now(settings))
    notes = results.pop("notes")
    results["bundle"] = _bundle(bundle, path)
    results["roofline"] = roofline(found, bandwidths)
    results["chip"] = {"id": found.id, "name": found.name}
    results["accuracy"] = exact
    notes += add_model(results, bundle, found, settings)
    notes += drift(bandwidths) + other_memory(results["roofline"]["bandwidth"], found, settings)
    notes += another_chip(found, settings.device) + crowded(settings)
    report = Report("run", {**vars(settings), "bundle": str(path), "chip": found.id}, results, notes=notes)
    record = check_record(json.loads(json.dumps(report.to_json())), path.name)
    report.notes += unsteady(record)
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
    known = find_device(chip, settings.device)
    ceiling = OTHER_FLAVOUR if settings.device == "CPU" and flavour != "native" else ""
    notes: list[str] = []
    for entry in results["contexts"]:
        middle = entry["context"] + settings.new_tokens // 2
        entry["read_bytes"] = weights.read + read_bytes(shape, middle, form, manifest.target)
        guess = decode(shape, weights.read, middle, form, chip, known, ceiling=ceiling)
        entry["predicted"] = vars(guess.rate) if guess.rate else None
        wait = first_token(shape, entry["context"], known, ceiling=ceiling).seconds
        entry["predicted_first_token"] = vars(wait) if wait else None
        notes += [guess.note] if guess.note and guess.note not in notes else []
        if len(entry["output_hashes"]) > 1:
            notes.append(f"repeats at {entry['context']} tokens gave different outputs")
    longest = max(settings.contexts) + settings.new_tokens
    if place(manifest.target, flavour) == "aipc stock":
        longest -= 1  # its cache grows by a row for each token that is fed, and the last one is not
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
            at.step.text(),
            at.rate.text(),
            share(at),
            ", ".join(at.hashes),
        )
    return found
