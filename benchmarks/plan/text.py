"""A plan in words: rows for a table, and JSON."""

from __future__ import annotations

from typing import Any

from cpm_edge.benchmarks.plan.chip import Device
from cpm_edge.benchmarks.plan.plan import Plan
from cpm_edge.benchmarks.plan.speed import Interval

UNVERIFIED = "unverified"
BARELY = 0.9  # the memory model is right within a tenth


def gigabytes(size: float) -> str:
    """``4.57 GB``, ``352 MB``: powers of ten, as disks and bandwidths are counted."""
    return f"{size / 1e9:.2f} GB" if size >= 1e9 else f"{size / 1e6:.0f} MB"


def rows(plan: Plan) -> list[tuple[str, str]]:
    """(name, value) pairs; an empty name continues the one before."""
    chip, export, formats = plan.chip, plan.export, plan.formats
    known = f"{chip.bandwidth.value / 1e9:.1f} GB/s" if chip.bandwidth else UNVERIFIED
    flavour = f" {plan.question.flavour}" if plan.target == "aipc" else ""
    size = f"{plan.shape.parameters / 1e9:.2f} G parameters, {plan.shape.layers} layers"
    found = [
        ("chip", f"{chip.name} ({chip.id}), {plan.device}: {chip.devices[plan.device].name}"),
        ("", f"memory bandwidth {known}, peak {_peaks(chip.devices[plan.device])}"),
        ("model", f"{size}, {_attention(plan)}"),
        ("target", f"{plan.target}{flavour}"),
        ("linear layers", formats.linear.describe()),
        ("embedding, head", f"{formats.embedding.describe()}, {formats.head.describe()}"),
        ("weight file", f"{gigabytes(plan.weights.total)}: {_classes(plan)}"),
        ("cache", f"{gigabytes(plan.cache.total)} for {plan.context} tokens: {_cache(plan)}"),
        ("device memory", _memory(plan)),
        ("", f"({plan.memory.source})"),
        ("fits", verdict(plan)),
    ]
    for index, change in enumerate(plan.advice):
        found.append(("" if index else "instead", f"{change.option}: {gigabytes(change.total)}"))
    verified = f"{gigabytes(export.memory)}, with verification about {gigabytes(export.verified)}"
    disk = f"{gigabytes(export.disk)} beside the checkpoint's {gigabytes(export.checkpoint)} in bf16"
    return [*found, *_speeds(plan), ("export memory", verified), ("export disk", disk)]


def _peaks(device: Device) -> str:
    units = (("fp16", "TFLOPS"), ("int8", "TOPS"))
    known = ((kind, unit, device.peaks[kind]) for kind, unit in units)
    return ", ".join(
        f"{kind} {peak.value / 1e12:g} {unit}" if peak else f"{kind} {UNVERIFIED}"
        for kind, unit, peak in known
    )


def _memory(plan: Plan) -> str:
    parts = {name: getattr(plan.memory, name) for name in ("weights", "cache", "workspace", "base")}
    each = ", ".join(f"{'process' if k == 'base' else k} {gigabytes(v)}" for k, v in parts.items())
    return f"{gigabytes(plan.memory.total)}: {each}"


def verdict(plan: Plan) -> str:
    """One line: yes, no or unknown, and by how much."""
    if plan.usable is None:
        return f"{UNVERIFIED}: machines with this chip differ in memory; say --memory GB"
    reserved = plan.chip.reserved
    room = f"{gigabytes(plan.usable)} ({reserved.value:.0%} reserved: {reserved.source})"
    if plan.fits:
        share = plan.memory.total / plan.usable
        return f"{'yes' if share < BARELY else 'barely'}: {share:.0%} of {room}"
    return f"no: {missing(plan)}"


def missing(plan: Plan) -> str:
    """What a plan that does not fit takes, and what there is."""
    usable, reserved = plan.usable or 0, plan.chip.reserved
    return (
        f"{gigabytes(plan.memory.total)} of memory, {plan.chip.id} has {gigabytes(usable)} "
        f"({reserved.value:.0%} reserved: {reserved.source})"
    )


def _attention(plan: Plan) -> str:
    shape = plan.shape
    kind = (
        "latent attention" if shape.is_latent else "sparse attention" if shape.sparse else "dense attention"
    )
    return (
        f"{kind} in {shape.cache_layers} of them, {shape.state_layers} recurrent"
        if shape.state_layers
        else kind
    )


def _classes(plan: Plan) -> str:
    return ", ".join(f"{kind} {gigabytes(size)}" for kind, size in plan.weights.file.items() if size > 1e5)


def _cache(plan: Plan) -> str:
    cache = plan.cache
    what = "latents" if plan.shape.is_latent else "keys and values"
    parts = [f"{what} {gigabytes(cache.rows)} in {cache.format}"]
    if cache.pooled:
        parts.append(f"pooled keys {gigabytes(cache.pooled)}")
    if cache.states:
        parts.append(f"states {gigabytes(cache.states)} (snapshots up to {gigabytes(cache.snapshots)} more)")
    return ", ".join(parts)


def _speeds(plan: Plan) -> list[tuple[str, str]]:
    found: list[tuple[str, str]] = []
    notes: list[str] = []
    for index, speed in enumerate(plan.speeds):
        decode, first = speed.decode, speed.first_token
        text = f"{decode.rate.text()} tok/s" if decode.rate else UNVERIFIED
        wait = f"first token {_seconds(first.seconds)}" if first.seconds else f"first token {UNVERIFIED}"
        line = f"at {speed.context} tokens, {speed.attention}: {text}, {wait}"
        found.append(("" if index else "speed", line))
        notes += [decode.note, first.note]
    known = plan.chip.devices[plan.device]
    notes += _merged([each.source for each in (known.roofline, known.prefill) if each])
    return found + [("", f"({note})") for note in dict.fromkeys(notes) if note]


def _merged(sources: list[str]) -> list[str]:
    """Sources of decode and of first tokens; what both say is said once."""
    if len(sources) < 2 or sources[0].startswith(sources[1]):
        return sources[:1]
    decode, first = (source.partition(": ") for source in sources)
    if decode[2] and decode[2] == first[2]:
        return [f"{decode[0]} of decode and {first[0]} of first tokens: {decode[2]}"]
    return sources


def _seconds(interval: Interval) -> str:
    if interval.high < 1:
        scaled = Interval(interval.low and interval.low * 1e3, interval.high * 1e3)
        return f"{scaled.text(0)} ms"
    return f"{interval.text(1)} s"


def to_json(plan: Plan) -> dict[str, Any]:
    """Every number, JSON-ready; null is not known."""
    cache, memory = plan.cache, plan.memory
    return {
        "chip": plan.chip.id,
        "device": plan.device,
        "target": plan.target,
        "flavour": plan.question.flavour if plan.target == "aipc" else None,
        "parameters": plan.shape.parameters,
        "context": plan.context,
        "formats": {
            "linear": plan.formats.linear.describe(),
            "embedding": plan.formats.embedding.describe(),
            "head": plan.formats.head.describe(),
        },
        "weight_file_bytes": {**plan.weights.file, "total": plan.weights.total},
        "cache_bytes": {**vars(cache), "total": cache.total},
        "device_memory_bytes": {**vars(memory), "total": memory.total},
        "usable_bytes": plan.usable,
        "fits": plan.fits,
        "advice": [vars(each) for each in plan.advice],
        "speeds": [
            {
                "context": each.context,
                "attention": each.attention,
                "decode_tokens_per_second": _pair(each.decode.rate),
                "first_token_seconds": _pair(each.first_token.seconds),
                "notes": [note for note in (each.decode.note, each.first_token.note) if note],
            }
            for each in plan.speeds
        ],
        "export_bytes": vars(plan.export),
        "sources": _sources(plan),
    }


def _sources(plan: Plan) -> dict[str, Any]:
    """The chip's numbers and constants that the plan is made of, and where each comes from."""
    chip, device = plan.chip, plan.chip.devices[plan.device]
    numbers = {"memory": chip.memory, "reserved": chip.reserved, "bandwidth": chip.bandwidth, **device.peaks}
    constants = {"decode": device.roofline, "first_token": device.prefill}
    found = {**numbers, **constants}
    return {name: vars(each) if each else None for name, each in found.items()}


def _pair(interval: Interval | None) -> dict[str, float | None] | None:
    return None if interval is None else {"low": interval.low, "high": interval.high}
