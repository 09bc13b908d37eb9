"""The report of a run as one HTML page that needs nothing beside it: no script, no font, no request."""

from __future__ import annotations

import shlex
from collections.abc import Iterable, Sequence
from html import escape
from pathlib import Path
from typing import Any

from cpm_edge.benchmarks.bundle.peers import published_runs
from cpm_edge.benchmarks.bundle.record import At, Record
from cpm_edge.benchmarks.bundle.svg import Band, Series, histogram, line_chart, number, stacked
from cpm_edge.benchmarks.bundle.verdict import verdict, warnings
from cpm_edge.benchmarks.samples import Samples

CSS = Path(__file__).parent / "report.css"
MB = 1e6


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
        *_accuracy(record.results.get("accuracy")),
        "<h2>Conditions</h2>",
        _facts(_conditions(record)),
        "<h2>Machine and versions</h2>",
        _facts(_machine(record)),
        "<h2>Bundle</h2>",
        _facts(_bundle(record)),
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


def subtitle(record: Record) -> str:
    """The setting in one line."""
    results, settings = record.results, record.content["settings"]
    chip, device = results["chip"], settings["device"]
    return f"{record.label} · {device} of {chip['name']} · {record.content['time']}"


def legend(entries: Sequence[tuple[str, str]]) -> str:
    """(style, name) pairs."""
    items = "".join(f'<span><i class="{style}"></i>{escape(name)}</span>' for style, name in entries)
    return f'<div class="legend">{items}</div>'


def spread(samples: Samples, digits: int = 1) -> str:
    """The median, and the extremes in small print."""
    text = samples.text(digits)
    middle, _, rest = text.partition(" ")
    return f"{middle} <small>{escape(rest)}</small>" if rest else middle


def command(record: Record) -> str:
    """What was typed."""
    return "cpm-bench " + shlex.join(str(part) for part in record.content["command"])


def _tiles(record: Record, ats: Sequence[At]) -> str:
    first, memory = ats[0], record.results["memory"]
    tiles = [
        (f"{first.rate.median:.1f}", f"tok/s decode after {first.context} tokens"),
        (f"{first.first.median * 1e3:.0f} ms" if first.first.median < 1 else f"{first.first.median:.2f} s",
         f"first token of {first.context} tokens"),
        (f"{first.prefill_rate.median:.0f}", "tok/s prefill"),
        ("-" if first.share is None else f"{first.share:.0%}", "of the memory roofline"),
        (f"{memory['peak'] / MB:.0f} MB" if memory.get("peak") else "-", "peak memory"),
        (f"{record.results['load_seconds']:.2f} s", "load"),
    ]  # fmt: skip
    joules = _energy(record)
    tiles.append((joules or "-", "energy a token" if joules else "energy a token: not exposed here"))
    return '<div class="tiles">' + "".join(
        f'<div class="tile"><b>{escape(value)}</b><span>{escape(name)}</span></div>' for value, name in tiles
    ) + "</div>"  # fmt: skip


def _energy(record: Record) -> str:
    """Joules a token; empty where the system does not tell."""
    conditions = record.results["conditions"]
    if conditions.get("joules") is None:
        return ""
    tokens = sum(len(steps) + 1 for e in record.results["contexts"] for steps in e["step_seconds"])
    return f"{conditions['joules'] / tokens:.2f} J"


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
    head = ("context", "first token, s", "prefill, tok/s", "time a token, ms", "decode, tok/s",
            "of roofline", "output")  # fmt: skip
    rows = []
    for at in ats:
        steps = Samples(1e3 / rate for rate in at.rate.values)
        share = "-" if at.share is None else f"{at.share:.0%}"
        cells = (
            str(at.context),
            spread(at.first, 3),
            spread(at.prefill_rate),
            spread(steps),
            spread(at.rate),
            share,
            escape(", ".join(at.hashes)),
        )
        rows.append("<tr>" + "".join(f"<td>{cell}</td>" for cell in cells) + "</tr>")
    headings = "".join(f"<th>{name}</th>" for name in head)
    return f'<div class="scroll"><table><tr>{headings}</tr>{"".join(rows)}</table></div>'


def _latency(ats: Sequence[At]) -> str:
    parts = []
    for at in ats if len(ats) < 3 else (ats[0], ats[-1]):
        ordered = sorted(at.steps)
        p50, p99 = ordered[len(ordered) // 2], ordered[min(len(ordered) - 1, int(0.99 * len(ordered)))]
        text = (
            f"{len(ordered)} steps after {at.context} tokens: median {p50:.1f} ms, "
            f"99 % within {p99:.1f} ms, longest {ordered[-1]:.1f} ms"
        )
        chart = histogram(ordered, "milliseconds a step", text)
        caption = f"{text}; the last bar holds all that is longer."
        parts.append(f"<figure>{chart}<figcaption>{caption}</figcaption></figure>")
    return "".join(parts)


def _memory(record: Record) -> str:
    memory = record.results["memory"]
    bars: list[tuple[str, list[tuple[str, float, str]]]] = []
    entries: list[tuple[str, str]] = []
    if memory.get("mapped_files") is not None and memory.get("anonymous") is not None:
        cache = min(memory["cache"], memory["anonymous"])
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
    return f"<figure>{stacked(bars, 'MB', text)}{legend(entries)}<figcaption>{text}</figcaption></figure>"


def _accuracy(found: dict[str, Any] | None) -> list[str]:
    if not found:
        return []
    rows = [
        ("perplexity", f"{found['perplexity']:.3f}, the reference's {found['reference_perplexity']:.3f}"),
        ("KL divergence", f"{found['kl']:.4f} nats a token"),
        ("same best token", f"{found['top1']:.1%} of {found['tokens']} tokens"),
        ("greedy text", str(found["greedy"]["summary"])),
        ("reference", f"{found['reference']}, on {found['text']}"),
    ]
    return ["<h2>Accuracy</h2>", _facts(rows)]


def _facts(rows: Iterable[tuple[str, str]]) -> str:
    lines = "".join(f"<tr><th>{escape(name)}</th><td>{escape(value)}</td></tr>" for name, value in rows)
    return f'<div class="scroll"><table class="facts">{lines}</table></div>'


def _conditions(record: Record) -> list[tuple[str, str]]:
    found = record.results["conditions"]
    others = found.get("others")
    joules = found.get("joules")
    settings = record.content["settings"]
    return [
        ("other processes", "unknown" if others is None else f"{others:.1%} of the cores' time"),
        ("temperature", _before_after(found.get("celsius"), 1, "°C")),
        ("clock", _before_after(found.get("hertz"), 1e-9, "GHz")),
        ("governor", found.get("governor") or "not exposed"),
        ("energy", "not exposed" if joules is None else f"{joules:.0f} J ({found['energy_source']})"),
        ("repeats", f"{settings['repeat']}, {settings['new_tokens']} tokens each, one warm-up"),
        (
            "threads",
            str(settings.get("threads") or record.results["engine"].get("threads") or "the engine's own"),
        ),
    ]


def _before_after(pair: Any, scale: float, unit: str) -> str:
    if not pair or pair[0] is None or pair[-1] is None:
        return "not exposed"
    return f"{pair[0] * scale:.2f} {unit} before, {pair[-1] * scale:.2f} {unit} after"


def _machine(record: Record) -> list[tuple[str, str]]:
    machine, versions = record.content["machine"], record.content["versions"]
    rows = [("chip", f"{record.results['chip']['name']} ({record.results['chip']['id']})")]
    memory = machine.get("memory_bytes")
    names = ("cpu", "cores", "isa", "system", "python")
    rows += [(name, str(machine[name])) for name in names if machine.get(name)]
    if memory:
        rows.append(("memory", f"{memory / 1e9:.1f} GB"))
    return rows + [(name, str(version)) for name, version in versions.items() if version]


def _bundle(record: Record) -> list[tuple[str, str]]:
    bundle = record.results["bundle"]
    largest = sorted(bundle.get("files", {}).items(), key=lambda pair: -pair[1])[:3]
    return [
        ("target", f"{bundle['target']} {bundle.get('flavour') or ''}".strip()),
        ("architecture", f"{bundle.get('architecture')}, {bundle.get('layers')} layers"),
        ("linear layers", bundle["weights"]),
        ("cache", str(bundle.get("cache"))),
        ("attention", "sparse" if bundle.get("sparse") else "dense"),
        ("longest context", str(bundle.get("max_context"))),
        ("largest files", ", ".join(f"{name} {size / MB:.0f} MB" for name, size in largest)),
        ("made by", str(bundle.get("producer"))),
    ]


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
