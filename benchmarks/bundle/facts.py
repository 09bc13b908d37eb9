"""What a report says in words, whatever it is written in: (name, value) rows and lines of one run."""

from __future__ import annotations

import shlex
from typing import Any

from cpm_edge.benchmarks.bundle.record import At, Record
from cpm_edge.benchmarks.plan.speed import Interval

MB = 1e6
Rows = list[tuple[str, str]]


def subtitle(record: Record) -> str:
    """The setting in one line."""
    results, settings = record.results, record.content["settings"]
    chip, device = results["chip"], settings["device"]
    return f"{record.label} · {device} of {chip['name']} · {record.content['time']}"


def command(record: Record) -> str:
    """What was typed."""
    return "cpm-bench " + shlex.join(str(part) for part in record.content["command"])


def share(at: At) -> str:
    """Of the roofline, ``-`` without one."""
    return "-" if at.share is None else f"{at.share:.0%}"


def guess(interval: tuple[float | None, float] | None, digits: int = 1) -> str:
    """A prediction, ``-`` without one."""
    return Interval(*interval).text(digits) if interval else "-"


def tail(at: At) -> str:
    """How long decode steps take, and how long the slowest of them."""
    ordered = sorted(at.steps)
    p50, p99 = ordered[len(ordered) // 2], ordered[min(len(ordered) - 1, int(0.99 * len(ordered)))]
    return (
        f"{len(ordered)} steps after {at.context} tokens: median {p50:.1f} ms, "
        f"99 % within {p99:.1f} ms, longest {ordered[-1]:.1f} ms"
    )


def energy(record: Record) -> str:
    """Joules of the whole measurement for each new token, prefills included; empty without a counter."""
    conditions = record.results["conditions"]
    if conditions.get("joules") is None:
        return ""
    tokens = sum(len(steps) + 1 for e in record.results["contexts"] for steps in e["step_seconds"])
    return f"{conditions['joules'] / tokens:.2f} J"


def memory(record: Record) -> Rows:
    """What a process held, and what the plan says of it."""
    found = record.results["memory"]
    names = (("peak", "peak"), ("loaded", "after loading"), ("mapped_files", "files: weights, libraries"),
             ("anonymous", "all else at the end"), ("cache", "of that the cache"))  # fmt: skip
    rows = [(name, f"{found[key] / MB:.0f} MB") for key, name in names if found.get(key) is not None]
    predicted = found.get("predicted")
    if predicted:
        parts = ", ".join(
            f"{key} {predicted[key] / MB:.0f}" for key in ("weights", "cache", "workspace", "base")
        )
        rows.append(("predicted by the plan", f"{predicted['total'] / MB:.0f} MB: {parts}"))
    return rows


def accuracy(record: Record) -> Rows:
    """Of ``cpm-bench accuracy``, empty where it was not measured."""
    found = record.results.get("accuracy")
    if not found:
        return []
    return [
        ("perplexity", f"{found['perplexity']:.3f}, the reference's {found['reference_perplexity']:.3f}"),
        ("KL divergence", f"{found['kl']:.4f} nats a token"),
        ("same best token", f"{found['top1']:.1%} of {found['tokens']} tokens"),
        ("greedy text", str(found["greedy"]["summary"])),
        ("reference", f"{found['reference']}, on {found['text']}"),
    ]


def conditions(record: Record) -> list[tuple[str, str]]:
    found = record.results["conditions"]
    others = found.get("others")
    joules = found.get("joules")
    settings, rounds = record.content["settings"], len(next(record.at()).first)
    return [
        ("other processes", "unknown" if others is None else f"{others:.1%} of the cores' time"),
        ("temperature", _before_after(found.get("celsius"), 1, "°C")),
        ("clock", _before_after(found.get("hertz"), 1e-9, "GHz")),
        ("governor", found.get("governor") or "not exposed"),
        ("energy", "not exposed" if joules is None else f"{joules:.0f} J ({found['energy_source']})"),
        ("repeats", f"{rounds}, {settings['new_tokens']} tokens each, one warm-up"),
        (
            "threads",
            str(settings.get("threads") or record.results["engine"].get("threads") or "the engine's own"),
        ),
    ]


def _before_after(pair: Any, scale: float, unit: str) -> str:
    if not pair or pair[0] is None or pair[-1] is None:
        return "not exposed"
    return f"{pair[0] * scale:.2f} {unit} before, {pair[-1] * scale:.2f} {unit} after"


def machine(record: Record) -> list[tuple[str, str]]:
    machine, versions = record.content["machine"], record.content["versions"]
    rows = [("chip", f"{record.results['chip']['name']} ({record.results['chip']['id']})")]
    memory = machine.get("memory_bytes")
    names = ("cpu", "cores", "isa", "system", "python")
    rows += [(name, str(machine[name])) for name in names if machine.get(name)]
    if memory:
        rows.append(("memory", f"{memory / 1e9:.1f} GB"))
    return rows + [(name, str(version)) for name, version in versions.items() if version]


def bundle(record: Record) -> list[tuple[str, str]]:
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
