"""Constants of the chip profiles, fitted to published runs (published.json).

Two of them for decode and two for prefill: ``bytes / bandwidth + layers * layer`` and
``operations / rate + layers * layer``, by least squares on relative errors. Runs that are marked held out
take no part, nor those of older versions of an engine, which are quoted instead.
``python -m cpm_edge.benchmarks.plan.fit`` writes the constants into chips/*.json.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from cpm_edge.benchmarks.plan.cache import read_bytes
from cpm_edge.benchmarks.plan.catalog import FOLDER
from cpm_edge.benchmarks.plan.chip import Prefill, Roofline
from cpm_edge.benchmarks.plan.shape import ABSORBED, HEAD, LINEAR, ModelShape
from cpm_edge.benchmarks.plan.speed import prompt_operations

PUBLISHED = Path(__file__).parent / "published.json"
NARROWEST, WIDEST = 0.10, 0.20  # half widths of an interval
MARGIN = 0.08  # on top of the largest residual


@dataclass(frozen=True)
class Run:
    """One published decode speed.

    Attributes:
        read: bytes that a token read, by the formats that the source names.
        rate: tokens a second.
        older: of a version that a newer one on the same GPU and memory has left behind.
    """

    chip: str
    device: str
    model: str
    shape: ModelShape
    context: int
    read: float
    rate: float
    held_out: bool
    older: bool


def published() -> dict[str, Any]:
    """The document: models by name, runs by chip, and chips that borrow the constants of another."""
    content: dict[str, Any] = json.loads(PUBLISHED.read_text(encoding="utf-8"))
    return content


def decode_runs(document: Mapping[str, Any]) -> list[Run]:
    """Every published decode speed."""
    found = []
    for entry in document["runs"]:
        for row in entry["decode"]:
            shape = ModelShape.read(document["models"][row["model"]])
            cache = read_bytes(shape, row["context"], "fp16", "aipc")
            read = _weights(shape, entry["linear_bits"], entry["head_bits"]) + cache
            found.append(
                Run(entry["chip"], entry["device"], row["model"], shape, row["context"], read, row["rate"],
                    row.get("held_out", False), entry.get("older", False))
            )  # fmt: skip
    return found


def _weights(shape: ModelShape, linear_bits: float, head_bits: float) -> float:
    bits = {LINEAR: linear_bits, ABSORBED: linear_bits, HEAD: head_bits}
    return sum(m.values * m.read * bits[m.kind] / 8 for m in shape.matrices if m.kind in bits)


def fit(
    amounts: Sequence[float], layers: Sequence[int], seconds: Sequence[float]
) -> tuple[float, float, float]:
    """(rate, seconds a layer, spread) of ``seconds = amount / rate + layers * layer``.

    With two runs or fewer the constants go through them, which says nothing about others: the widest spread.
    """
    amount, layer, time = (np.asarray(each, np.float64) for each in (amounts, layers, seconds))
    table = np.stack([amount / time, layer / time], 1)
    (inverse, each), *_ = np.linalg.lstsq(table, np.ones(len(time)), rcond=None)
    if each < 0 or inverse <= 0:
        inverse, each = float((amount / time).sum() / ((amount / time) ** 2).sum()), 0.0
    residual = float(np.abs((amount * inverse + layer * each) / time - 1).max())
    spread = WIDEST if len(time) < 3 else min(WIDEST, max(NARROWEST, MARGIN + residual))
    return 1 / float(inverse), float(each), spread


def roofline(document: Mapping[str, Any], chip: str) -> Roofline | None:
    """From a chip's runs that are not held out; None without any."""
    runs = [run for run in decode_runs(document) if run.chip == chip and not (run.held_out or run.older)]
    if not runs:
        return None
    bandwidth, layer, spread = fit(
        [run.read for run in runs], [run.shape.layers for run in runs], [1 / run.rate for run in runs]
    )
    return Roofline(_rounded(bandwidth), _rounded(layer), round(spread, 3), _source(document, chip, "decode"))


def prefill(document: Mapping[str, Any], chip: str) -> Prefill | None:
    """Likewise, from times to first token."""
    entries = (entry for entry in document["runs"] if entry["chip"] == chip)
    rows = [
        row
        for entry in entries
        for row in entry["prefill"]
        if not (row.get("held_out") or entry.get("older"))
    ]
    if not rows:
        return None
    shapes = [ModelShape.read(document["models"][row["model"]]) for row in rows]
    amounts = [prompt_operations(shape, row["tokens"]) for shape, row in zip(shapes, rows, strict=True)]
    times = [row["seconds"] for row in rows]
    rate, layer, _ = fit(amounts, [shape.layers for shape in shapes], times)
    guess = [amount / rate + shape.layers * layer for amount, shape in zip(amounts, shapes, strict=True)]
    worst = max(abs(each / time - 1) for each, time in zip(guess, times, strict=True))
    # Published prompts have one length, and kernels change with it.
    spread = round(min(0.5, max(WIDEST, MARGIN + worst)), 3)
    return Prefill(_rounded(rate), _rounded(layer), spread, _source(document, chip, "prefill"))


def constants(document: Mapping[str, Any], chip: str) -> dict[str, Any]:
    """The profile's ``roofline`` and ``prefill``, borrowed with a wide spread where a sibling has them."""
    sibling = document["like"].get(chip)
    decode, prompt = roofline(document, sibling or chip), prefill(document, sibling or chip)
    found: dict[str, Any] = {
        "roofline": vars(decode) if decode else None,
        "prefill": vars(prompt) if prompt else None,
    }
    if sibling:
        for key, least in (("roofline", WIDEST), ("prefill", 0.4)):
            if found[key]:
                note = f"those of {sibling}, whose GPU and memory are close; not measured on this chip"
                quoted = _older(document, chip) if key == "roofline" else ""
                found[key] = {
                    **found[key],
                    "spread": max(least, found[key]["spread"]),
                    "source": note + quoted,
                }
    return found


def _older(document: Mapping[str, Any], chip: str) -> str:
    """Published speeds of older versions, which an interval for today's need not hold."""
    told = [
        f"{entry['source']}: "
        + ", ".join(f"{row['model']} {row['rate']:g} tok/s at {row['context']}" for row in entry["decode"])
        for entry in document["runs"]
        if entry["chip"] == chip and entry.get("older")
    ]
    return f"; published of an older version: {'; '.join(told)}" if told else ""


def _source(document: Mapping[str, Any], chip: str, kind: str) -> str:
    entry = next(entry for entry in document["runs"] if entry["chip"] == chip)
    count = sum(not row.get("held_out") for row in entry[kind])
    return f"fit of {count} published runs: {entry['source']}"


def _rounded(value: float) -> float:
    return float(f"{value:.4g}")


def write_constants() -> None:
    """Put the constants into the profiles."""
    document = published()
    for path in FOLDER.glob("*.json"):
        content = json.loads(path.read_text(encoding="utf-8"))
        device = content["devices"].get("GPU")
        if device is not None:
            device.update(constants(document, content["id"]))
            path.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    write_constants()
