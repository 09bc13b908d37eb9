"""The report of a run as Markdown, for issues and model cards."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from cpm_edge.benchmarks.bundle.facts import (
    Rows,
    accuracy,
    bundle,
    command,
    conditions,
    energy,
    guess,
    machine,
    memory,
    share,
    subtitle,
    tail,
)
from cpm_edge.benchmarks.bundle.peers import published_runs
from cpm_edge.benchmarks.bundle.record import Record
from cpm_edge.benchmarks.bundle.verdict import verdict, warnings


def report_markdown(record: Record) -> str:
    """What the page says, without its charts and the method."""
    results = record.results
    joules = energy(record)
    lines = [f"# {results['bundle']['name']}", "", subtitle(record), "", verdict(record), ""]
    lines += [f"- {text}" for text in warnings(record)]
    lines += ["", "## Speed", "", *_speed(record)]
    lines += [
        "",
        f"Load {results['load_seconds']:.2f} s, energy a new token with prefills: {joules or 'not exposed'}.",
    ]
    lines += [f"Roofline: {results['roofline']['source']}."]
    lines += [f"- {tail(at)}" for at in record.at()]
    lines += [f"- {run.name}: {', '.join(f'{y:g} tok/s at {x:g}' for x, y in run.points)}"
              for run in published_runs(record)]  # fmt: skip
    for title, rows in (
        ("Memory", memory(record)),
        ("Accuracy", accuracy(record)),
        ("Conditions", conditions(record)),
        ("Machine and versions", machine(record)),
        ("Bundle", bundle(record)),
    ):
        lines += _section(title, rows)
    lines += _card(str(results["bundle"].get("card") or ""))
    lines += ["", "## How to reproduce", "", "```", command(record), "```"]
    return "\n".join(lines) + "\n"


def _speed(record: Record) -> Iterator[str]:
    yield _row(("context", "first token, s", "predicted", "prefill, tok/s", "TPOT, ms", "decode, tok/s",
                "predicted", "of roofline", "output"))  # fmt: skip
    yield "|" + "---|" * 9
    for at in record.at():
        yield _row((str(at.context), at.first.text(3), guess(at.predicted_first, 2), at.prefill_rate.text(),
                    at.step.text(), at.rate.text(), guess(at.predicted), share(at),
                    ", ".join(at.hashes)))  # fmt: skip


def _section(title: str, rows: Rows) -> list[str]:
    if not rows:
        return []
    return ["", f"## {title}", "", "| | |", "|---|---|", *(_row(row) for row in rows)]


def _card(card: str) -> list[str]:
    """The bundle's model card, folded; its fences and headings stay its own."""
    if not card:
        return []
    return ["", "<details><summary>Model card</summary>", "", card.strip(), "", "</details>"]


def _row(cells: Iterable[str]) -> str:
    return "| " + " | ".join(cell.replace("|", "\\|").replace("\n", " ") for cell in cells) + " |"
