"""``cpm-bench compare``: several records in one table and on one page, beside the first of them."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape

from rich.table import Table

from cpm_edge.benchmarks.bundle.facts import share
from cpm_edge.benchmarks.bundle.html import legend, page, spread
from cpm_edge.benchmarks.bundle.record import At, Record
from cpm_edge.benchmarks.bundle.svg import Series, line_chart, number
from cpm_edge.benchmarks.bundle.verdict import warnings
from cpm_edge.benchmarks.samples import agree, ratio

COLOURS = ("s1", "s2", "s3", "s4", "s5", "s6")
STYLES = (*COLOURS, *(f"{each} dashed" for each in COLOURS), *(f"{each} dotted" for each in COLOURS))


def names(records: Sequence[Record]) -> list[str]:
    """A different one for each: the label, and what tells equal labels apart."""
    labels = [f"{each.label} · {each.results['chip']['id']}" for each in records]
    told = [
        label if labels.count(label) == 1 else f"{label} ({each.name})"
        for label, each in zip(labels, records, strict=True)
    ]
    return [name if told.count(name) == 1 else f"{name} no. {index}" for index, name in enumerate(told, 1)]


def compare_table(records: Sequence[Record]) -> Table:
    """Speeds by context, with ratios to the first record."""
    table = Table(
        "record", "context", "first token, s", "decode, tok/s", "to the first", "of roofline", "output"
    )
    for name, at, base in _rows(records):
        table.add_row(
            name,
            str(at.context),
            at.first.text(3),
            at.rate.text(),
            _to_first(at, base),
            share(at),
            _output(at, base),
        )
    return table


def compare_html(records: Sequence[Record]) -> str:
    """A page with one line a record."""
    titles = names(records)
    styles = [STYLES[index % len(STYLES)] for index in range(len(records))]
    series = [
        Series(title, [(at.context, at.rate.median) for at in record.at()], style,
               [(min(at.rate.values), max(at.rate.values)) for at in record.at()])
        for title, style, record in zip(titles, styles, records, strict=True)
    ]  # fmt: skip
    summary = "Decoded tokens a second by context: " + "; ".join(
        f"{each.name}: " + ", ".join(f"{number(y)} at {number(x)}" for x, y in each.points) for each in series
    )
    chart = line_chart(series, [], "tokens in the context", "tok/s", summary)
    notes = compare_notes(records)
    body = [
        "<h1>Comparison</h1>",
        f'<p class="soft">{len(records)} runs; ratios are to the first.</p>',
        f"<figure>{chart}{legend(list(zip(styles, titles, strict=True)))}</figure>",
        _html_table(records),
        *(["<h2>Notes</h2>"] if notes else []),
        *(f'<p class="warn">{escape(note)}</p>' for note in notes),
    ]
    return page("Comparison", body)


def compare_notes(records: Sequence[Record]) -> list[str]:
    """What a reader must know of each record before believing a ratio."""
    told = [(name, warnings(record)) for name, record in zip(names(records), records, strict=True)]
    return [f"{name}: {'; '.join(notes)}" for name, notes in told if notes]


def _html_table(records: Sequence[Record]) -> str:
    head = ("run", "context", "first token, s", "decode, tok/s", "to the first", "of roofline", "output")
    rows = []
    for name, at, base in _rows(records):
        cells = (escape(name), str(at.context), spread(at.first, 3), spread(at.rate),
                 _to_first(at, base),
                 share(at), escape(_output(at, base)))  # fmt: skip
        rows.append("<tr>" + "".join(f"<td>{cell}</td>" for cell in cells) + "</tr>")
    headings = "".join(f"<th>{name}</th>" for name in head)
    return f'<div class="scroll"><table class="wide"><tr>{headings}</tr>{"".join(rows)}</table></div>'


def _rows(records: Sequence[Record]) -> list[tuple[str, At, At | None]]:
    """(name, what was measured, the first record at the same context), by context."""
    first = {at.context: at for at in records[0].at()}
    found = [
        (name, at, first.get(at.context))
        for name, record in zip(names(records), records, strict=True)
        for at in (first.values() if record is records[0] else record.at())
    ]
    return sorted(found, key=lambda row: row[1].context)


def _to_first(at: At, base: At | None) -> str:
    """The ratio of speeds, and whether it says more than repeats of one run do."""
    if base is None:
        return "-"
    same = base is not at and agree(at.rate, base.rate)
    return ratio(at.rate, base.rate) + (", within the spread" if same else "")


def _output(at: At, base: At | None) -> str:
    if base is None or base is at:
        return ", ".join(at.hashes)
    return "the same" if at.hashes == base.hashes else "another"
