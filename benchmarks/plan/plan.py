"""The plan: will it fit, how fast will it be, what does the export take. From config.json alone."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from cpm_edge.benchmarks.plan.cache import CacheBytes, cache_bytes, cache_format
from cpm_edge.benchmarks.plan.catalog import chip as find_chip
from cpm_edge.benchmarks.plan.chip import Chip, Device, Number
from cpm_edge.benchmarks.plan.errors import PlanError
from cpm_edge.benchmarks.plan.memory import DeviceMemory, ExportCost, device_memory, export_cost
from cpm_edge.benchmarks.plan.shape import ModelShape
from cpm_edge.benchmarks.plan.speed import OTHER_FLAVOUR, Decode, FirstToken, decode, first_token
from cpm_edge.benchmarks.plan.storage import Formats, WeightBytes, weight_bytes

SHORT = 512
VERIFIED = 64  # tokens that an export compares, as --verify-tokens has it
TARGETS = ("ort", "aipc", "jetson", "rtx")
FLAVOURS = ("stock", "native")
CPU_OR_INTEL = ("ort", "aipc")  # targets that no NVIDIA GPU runs


@dataclass(frozen=True)
class Question:
    """What is asked, by the names of ``cpm-export``'s options.

    Attributes:
        target: None is the chip's own.
        context: tokens; None is the most that the config allows.
        memory: bytes, in place of the chip's.
        device: of the chip; None is CPU for targets and flavours that run there alone, else its first.
    """

    target: str | None = None
    flavour: str = "stock"
    weight_format: str = "auto"
    group_size: int | None = None
    symmetric: bool = True
    embedding_format: str | None = None
    head_format: str | None = None
    attention: str = "auto"
    kv_cache: str | None = None
    context: int | None = None
    memory: int | None = None
    device: str | None = None


@dataclass(frozen=True)
class Speed:
    """Predictions at one context; ``attention`` is dense or sparse."""

    context: int
    attention: str
    decode: Decode
    first_token: FirstToken


@dataclass(frozen=True)
class Change:
    """Something else to ask for, and the memory it would take."""

    option: str
    total: int


@dataclass(frozen=True)
class Plan:
    """The answer.

    Attributes:
        usable: bytes of the machine without the reserved share; None where its memory is not known.
        advice: the cheapest changes that would make it fit, empty where it fits.
    """

    question: Question
    shape: ModelShape
    chip: Chip
    device: str
    target: str
    formats: Formats
    context: int
    weights: WeightBytes
    cache: CacheBytes
    memory: DeviceMemory
    export: ExportCost
    speeds: tuple[Speed, ...]
    usable: int | None
    advice: tuple[Change, ...] = field(default=())

    @property
    def fits(self) -> bool | None:
        """None where the memory of the machine is not known."""
        return None if self.usable is None else self.memory.total <= self.usable


def plan(
    config: Mapping[str, Any] | str | Path,
    chip: str | Chip = "auto",
    question: Question | None = None,
    **asked: Any,
) -> Plan:
    """Plan one export for one chip.

    Args:
        config: a parsed config.json, its path, or the folder of a checkpoint.
        chip: a profile or its id; auto detects this machine, this-machine measures it.
        question: or its fields by name.

    Raises:
        PlanError: a config, chip or option that cannot be planned.
    """
    if question is not None and asked:
        raise PlanError(f"question: expected it alone, or its fields by name, got both: {', '.join(asked)}")
    question = question or Question(**asked)
    shape = ModelShape.read(config)
    found = _chip(chip, question.target) if isinstance(chip, str) else chip
    answer = _answer(shape, found, question)
    if answer.fits is False:
        from cpm_edge.benchmarks.plan.advice import advice

        answer = replace(answer, advice=advice(answer, lambda changed: _answer(shape, found, changed)))
    return answer


def _chip(name: str, target: str | None) -> Chip:
    from cpm_edge.benchmarks.plan.detect import detect, read_signs

    if name == "auto":
        return detect(nvidia=target not in CPU_OR_INTEL)
    if name == "this-machine":
        from cpm_edge.benchmarks.plan.this_machine import this_machine

        return this_machine(read_signs())
    return find_chip(name)


def _answer(shape: ModelShape, chip: Chip, question: Question) -> Plan:
    target = question.target or chip.target
    if target not in TARGETS:
        raise PlanError(f"--target: expected one of {', '.join(TARGETS)}, got {target}")
    _check_values(question, target)
    _check_pair(target, chip)
    flavour = question.flavour if target == "aipc" else ""
    name, device = _device(chip, target, question)
    asked = shape.with_attention(question.attention)
    formats = Formats.settle(
        asked, question.weight_format, question.group_size, question.symmetric,
        question.embedding_format, question.head_format,
    )  # fmt: skip
    context = question.context or shape.positions
    if context > shape.positions:
        raise PlanError(
            f"--max-context: expected at most {shape.positions} (max_position_embeddings), got {context}",
            hint="a longer context needs a rope_scaling made for it in config.json",
        )
    form = cache_format(asked, target, flavour, question.kv_cache, formats.linear.name)
    weights = weight_bytes(asked, formats, target, flavour)
    cache = cache_bytes(asked, context, target, flavour, form)
    memory = device_memory(asked, weights, cache, target, flavour, name)
    ceiling = OTHER_FLAVOUR if name == "CPU" and flavour != "native" else ""
    few = cache_bytes(asked, min(context, VERIFIED), target, flavour, form)
    session = device_memory(asked, weights, few, target, flavour, "CPU")
    available = Number(question.memory, "--memory") if question.memory else chip.memory
    usable = int(available.value * (1 - chip.reserved.value)) if available else None
    return Plan(
        question=question,
        shape=asked,
        chip=chip,
        device=name,
        target=target,
        formats=formats,
        context=context,
        weights=weights,
        cache=cache,
        memory=memory,
        export=export_cost(asked, weights, session, target),
        speeds=tuple(_speeds(asked, weights.read, context, form, chip, device, ceiling)),
        usable=usable,
    )


def _check_values(question: Question, target: str) -> None:
    if target == "aipc" and question.flavour not in FLAVOURS:
        raise PlanError(f"--flavour: expected one of {', '.join(FLAVOURS)}, got {question.flavour}")
    for option, value in (("--max-context", question.context), ("--memory", question.memory)):
        if value is not None and value < 1:
            raise PlanError(f"{option}: expected a number above 0, got {value}")


def _check_pair(target: str, chip: Chip) -> None:
    if target == chip.target or (target in CPU_OR_INTEL and chip.kind not in ("jetson", "rtx")):
        return
    if chip.id == "this-machine":
        raise PlanError(
            f"--target {target}: expected a machine whose {target} chip a profile names, found none here",
            hint="pass --chip; cpm-bench chips lists the ids",
        )
    raise PlanError(
        f"--chip {chip.id}: expected a chip for target {target}, this one is for {chip.target}",
        hint=f"--target {chip.target}, or another chip",
    )


def _device(chip: Chip, target: str, question: Question) -> tuple[str, Device]:
    cpu_only = target == "ort" or (target == "aipc" and question.flavour == "native")
    name = question.device or ("CPU" if cpu_only and "CPU" in chip.devices else next(iter(chip.devices)))
    if name not in chip.devices:
        raise PlanError(f"--device: expected one of {', '.join(chip.devices)} of {chip.id}, got {name}")
    if cpu_only and name != "CPU":
        what = "ort bundles run" if target == "ort" else "the native flavour runs"
        raise PlanError(
            f"--device: {what} on the CPU, got {name}", hint="--target aipc --flavour stock for other devices"
        )
    return name, chip.devices[name]


def _speeds(
    shape: ModelShape, read: float, context: int, form: str, chip: Chip, device: Device, ceiling: str
) -> list[Speed]:
    """At a short and the longest context, dense, and sparse where the model is and it makes a difference."""
    found = []
    for tokens in sorted({min(SHORT, context), context}):
        for kind in ("dense", "sparse"):
            if kind == "sparse" and (shape.sparse is None or tokens < shape.sparse.dense_len):
                continue
            each = shape if kind == "sparse" else replace(shape, sparse=None)
            found.append(
                Speed(
                    tokens,
                    kind,
                    decode(each, read, tokens - 1, form, chip, device, ceiling=ceiling),
                    first_token(each, tokens, device, ceiling=ceiling),
                )
            )
    return found
