"""The report of a run as one HTML page that needs nothing beside it: no script, no font, no request."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from html import escape
from pathlib import Path

from cpm_edge.benchmarks.bundle.facts import (
    MB,
    accuracy,
    bundle,
    command,
    conditions,
    energy,
    guess,
    machine,
    share,
    subtitle,
    tail,
)
from cpm_edge.benchmarks.bundle.peers import published_runs
from cpm_edge.benchmarks.bundle.record import At, Record
from cpm_edge.benchmarks.bundle.svg import Band, Series, histogram, line_chart, number, stacked
from cpm_edge.benchmarks.bundle.verdict import verdict, warnings
from cpm_edge.benchmarks.samples import Samples

CSS = Path(__file__).parent / "report.css"


def report_html(record: Record) -> str:
    """The page."""
    ats = list(record.at())
    body = [
        f"<h1>{escape(record.results['bundle']['name'])}</h1>",
        f'<p class="soft">{escape(subtitle(record))}</p>',
        f'<p class="verdict">{escape(verdict(record))}</p>',
        *(f'<p class="warn">{escape(text)}</p>' for text in warnings(record)),
        _tiles(record, ats),
        "<h2>Speed</h2>",
        _speed(record, ats),
        _table(ats),
        "<h2>Latency of decode steps</h2>",
        _latency(ats),
        "<h2>Memory</h2>",
        _memory(record),
        *_accuracy(record),
        "<h2>Conditions</h2>",
        _facts(conditions(record)),
        "<h2>Machine and versions</h2>",
        _facts(machine(record)),
        "<h2>Bundle</h2>",
        _facts(bundle(record)),
        _card(record),
        "<h2>How to reproduce</h2>",
        f"<pre>{escape(command(record))}</pre>",
        _method(),
    ]
    return page(record.results["bundle"]["name"], body)


def page(title: str, body: Iterable[str]) -> str:
    """A whole document around parts that are escaped already."""
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        '<link rel="icon" href="data:,">'
        f"<title>{escape(title)} · cpm-bench</title><style>{CSS.read_text(encoding='utf-8')}</style></head>"
        f"<body><main>{''.join(body)}</main></body></html>\n"
    )


def legend(entries: Sequence[tuple[str, str]]) -> str:
    """(style, name) pairs."""
    items = "".join(f'<span><i class="{style}"></i>{escape(name)}</span>' for style, name in entries)
    return f'<div class="legend">{items}</div>'


def spread(samples: Samples, digits: int = 1) -> str:
    """The median, and the extremes in small print."""
    text = samples.text(digits)
    middle, _, rest = text.partition(" ")
    return f"{middle} <small>{escape(rest)}</small>" if rest else middle


def _tiles(record: Record, ats: Sequence[At]) -> str:
    first, memory = ats[0], record.results["memory"]
    tiles = [
        (f"{first.rate.median:.1f}", f"tok/s decode after {first.context} tokens"),
        (f"{first.first.median * 1e3:.0f} ms" if first.first.median < 1 else f"{first.first.median:.2f} s",
         f"first token of {first.context} tokens"),
        (f"{first.prefill_rate.median:.0f}", "tok/s prefill"),
        (share(first), "of the memory roofline"),
        (f"{memory['peak'] / MB:.0f} MB" if memory.get("peak") else "-", "peak memory"),
        (f"{record.results['load_seconds']:.2f} s", "load"),
    ]  # fmt: skip
    joules = energy(record)
    tiles.append(
        (
            joules or "-",
            "energy a new token, prefills included" if joules else "energy a token: not exposed here",
        )
    )
    return '<div class="tiles">' + "".join(
        f'<div class="tile"><b>{escape(value)}</b><span>{escape(name)}</span></div>' for value, name in tiles
    ) + "</div>"  # fmt: skip


def _speed(record: Record, ats: Sequence[At]) -> str:
    series = [
        Series(
            "measured",
            [(at.context, at.rate.median) for at in ats],
            "s1",
            [(min(at.rate.values), max(at.rate.values)) for at in ats],
        )
    ]
    entries = [("s1", "measured: median, extremes of the repeats")]
    roof = [(at.context, at.ceiling) for at in ats if at.ceiling]
    if roof:
        series.append(Series("roofline", roof, "roof"))
        entries.append(("roof", "what reading the weights and the cache allows"))
    inside = [(at.context, at.predicted[0], at.predicted[1]) for at in ats
              if at.predicted and at.predicted[0] is not None]  # fmt: skip
    bands = [Band("predicted by the chip's profile", inside)] if inside else []
    if bands:
        entries.append(("band", "predicted by the chip's profile"))
    for run in published_runs(record):
        series.append(Series(run.name, run.points, "peer"))
        entries.append(("peer", run.name))
    summary = "Decoded tokens a second by context: " + ", ".join(
        f"{number(at.rate.median)} at {at.context}" for at in ats
    )
    chart = line_chart(series, bands, "tokens in the context", "tok/s", summary)
    source = f"Roofline: {record.results['roofline']['source']}."
    return f"<figure>{chart}{legend(entries)}<figcaption>{escape(source)}</figcaption></figure>"


def _table(ats: Sequence[At]) -> str:
    head = ("context", "first token, s", "predicted", "prefill, tok/s", "time a token, ms", "decode, tok/s",
            "predicted", "of roofline", "output")  # fmt: skip
    rows = []
    for at in ats:
        cells = (
            str(at.context),
            spread(at.first, 3),
            guess(at.predicted_first, 2),
            spread(at.prefill_rate),
            spread(at.step),
            spread(at.rate),
            guess(at.predicted),
            share(at),
            escape(", ".join(at.hashes)),
        )
        rows.append("<tr>" + "".join(f"<td>{cell}</td>" for cell in cells) + "</tr>")
    headings = "".join(f"<th>{name}</th>" for name in head)
    return f'<div class="scroll"><table class="wide"><tr>{headings}</tr>{"".join(rows)}</table></div>'


def _latency(ats: Sequence[At]) -> str:
    parts = []
    for at in ats:
        text = tail(at)
        chart = histogram(at.steps, "milliseconds a step", text)
        caption = f"{text}; the last bar holds all that is longer."
        parts.append(f"<figure>{chart}<figcaption>{caption}</figcaption></figure>")
    return "".join(parts)


def _memory(record: Record) -> str:
    memory = record.results["memory"]
    bars: list[tuple[str, list[tuple[str, float, str]]]] = []
    entries: list[tuple[str, str]] = []
    if memory.get("mapped_files") is not None and memory.get("anonymous") is not None:
        on_host = record.content["settings"]["device"] == "CPU"
        cache = min(memory["cache"], memory["anonymous"]) if on_host else 0
        rest = (memory["anonymous"] - cache) / MB
        parts = [
            ("mapped files: weights, libraries", memory["mapped_files"] / MB, "s1"),
            ("cache", cache / MB, "s2"),
            ("the rest: repacked weights, workspace, interpreter", rest, "s3"),
        ]
        bars.append(("resident at the end", parts))
        entries += [(style, name) for name, _, style in parts]
    predicted = memory.get("predicted")
    if predicted:
        named = (("weights", "weights", "s1"), ("cache", "cache", "s2"), ("workspace", "workspace", "s4"),
                 ("base", "process", "s6"))  # fmt: skip
        parts = [(name, predicted[key] / MB, style) for key, name, style in named]
        bars.append(("predicted by the plan", parts))
        entries += [("s4", "workspace (predicted)"), ("s6", "process (predicted)")]
    if not bars:
        return '<p class="soft">This system does not tell what a process holds.</p>'
    peak = f"Peak {memory['peak'] / MB:.0f} MB" if memory.get("peak") else "Peak unknown"
    text = f"{peak}, at the longest context of this run."
    if record.content["settings"]["device"] != "CPU":
        text += " That is of the process on the host; the plan is of the device's memory."
    return f"<figure>{stacked(bars, 'MB', text)}{legend(entries)}<figcaption>{text}</figcaption></figure>"


def _accuracy(record: Record) -> list[str]:
    found = accuracy(record)
    return ["<h2>Accuracy</h2>", _facts(found)] if found else []


def _facts(rows: Iterable[tuple[str, str]]) -> str:
    lines = "".join(f"<tr><th>{escape(name)}</th><td>{escape(value)}</td></tr>" for name, value in rows)
    return f'<div class="scroll"><table class="facts">{lines}</table></div>'


def _card(record: Record) -> str:
    card = record.results["bundle"].get("card")
    return f"<details><summary>Model card</summary><pre>{escape(card)}</pre></details>" if card else ""


def _method() -> str:
    return (
        "<footer><p>A repeat is a fresh session: random tokens are prefilled (time to first token), then "
        "tokens are decoded greedily one by one. Decode speed leaves the first token out. Medians, with the "
        "extremes behind them; one repeat before all others is thrown away. The output hash tells whether "
        "two runs gave the same tokens. Tokenizing and sampling are not part of it.</p></footer>"
    )
