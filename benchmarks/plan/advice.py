"""Changes that would make a model fit, the cheapest in quality first."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from itertools import combinations

from cpm_edge.benchmarks.plan.catalog import chips
from cpm_edge.benchmarks.plan.errors import PlanError
from cpm_edge.benchmarks.plan.plan import Change, Plan, Question

MOST = 3
SHORTEST = 256  # tokens below which a context is of no use
_SIZES = {"fp32": 5, "fp16": 4, "bf16": 4, "int8": 3, "auto": 2, "int4": 2, "ternary": 1}


def advice(plan: Plan, answer: Callable[[Question], Plan]) -> tuple[Change, ...]:
    """At most three; those that keep the weights as they are come first.

    Args:
        plan: one that does not fit.
        answer: the plan of another question, for the same model and chip.
    """
    single = list(_changes(plan))
    found: list[Change] = []
    for count in (1, 2):
        for chosen in combinations(single, count):
            if len(found) == MOST:
                return tuple(found)
            change = _tried(plan, answer, dict(pair for _, fields in chosen for pair in fields.items()))
            used = {part for each in found for part in each.option.split(" and ")}
            if change and not used & {option for option, _ in chosen}:
                found.append(Change(" and ".join(option for option, _ in chosen), change.memory.total))
        shorter = _shorter(plan, answer) if count == 1 else None
        if shorter and len(found) < MOST:
            found.append(shorter)
    # --memory would stay with another chip, too.
    larger = None if plan.question.memory else _larger_chip(plan)
    if larger and len(found) < MOST:
        found.append(larger)
    return tuple(found)


def _changes(plan: Plan) -> Iterator[tuple[str, dict[str, object]]]:
    question = plan.question
    if plan.target == "aipc" and question.flavour == "stock" and plan.device == "CPU":
        yield "--flavour native", {"flavour": "native", "kv_cache": None}
    if question.kv_cache != "int8" and plan.cache.format != "int8":
        yield "--kv-cache int8", {"kv_cache": "int8"}
    if _SIZES[question.weight_format] > 3:
        yield "--weight-format int8", {"weight_format": "int8"}
    if _SIZES[question.weight_format] > 2:
        yield "--weight-format int4", {"weight_format": "int4"}
    if plan.formats.linear.name == "int4" and plan.formats.linear.group < 128:
        yield "--group-size 128", {"weight_format": "int4", "group_size": 128}


def _tried(plan: Plan, answer: Callable[[Question], Plan], fields: dict[str, object]) -> Plan | None:
    """The plan with these fields changed, where that is possible and fits."""
    try:
        changed = answer(replace(plan.question, **fields))  # type: ignore[arg-type]
    except PlanError:
        return None
    return changed if changed.fits else None


def _shorter(plan: Plan, answer: Callable[[Question], Plan]) -> Change | None:
    """The longest context that fits, in whole blocks of 256."""
    low, high = 0, plan.context // SHORTEST
    while low < high:
        middle = (low + high + 1) // 2
        if _tried(plan, answer, {"context": middle * SHORTEST}):
            low = middle
        else:
            high = middle - 1
    if not low:
        return None
    changed = answer(replace(plan.question, context=low * SHORTEST))
    return Change(f"--max-context {low * SHORTEST}", changed.memory.total)


def _larger_chip(plan: Plan) -> Change | None:
    """The smallest chip of the same kind with enough memory."""
    room = [
        each for each in chips().values()
        if each.kind == plan.chip.kind
        and each.id != plan.chip.id
        and (each.usable_bytes or 0) >= plan.memory.total
    ]  # fmt: skip
    if not room:
        return None
    smallest = min(room, key=lambda each: each.usable_bytes or 0)
    return Change(f"--chip {smallest.id}", plan.memory.total)
