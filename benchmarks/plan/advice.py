"""Changes that would make a model fit, the cheapest in quality first."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from itertools import combinations

from cpm_edge.benchmarks.plan.catalog import chips
from cpm_edge.benchmarks.plan.errors import PlanError
from cpm_edge.benchmarks.plan.plan import Change, Plan, Question

MOST = 3
BLOCK, SHORTEST = 256, 1024  # tokens: steps of a context that is tried, and the least that is of use
_SIZES = {"fp32": 5, "fp16": 4, "bf16": 4, "int8": 3, "auto": 2, "int4": 2, "ternary": 1}


_Changed = tuple[str, dict[str, object]]  # the option as typed, and the fields of a question


def advice(plan: Plan, answer: Callable[[Question], Plan]) -> tuple[Change, ...]:
    """At most three: single options, a shorter context, then several options together.

    Args:
        plan: one that does not fit.
        answer: the plan of another question, for the same model and chip.
    """
    single = list(_changes(plan))
    found: list[Change] = []
    for count in (1, 2, 3):
        for chosen in combinations(single, count):
            if len(found) == MOST:
                return tuple(found)
            change = _tried(plan, answer, _fields(chosen))
            used = {part for each in found for part in each.option.split(" and ")}
            if change and not used & {option for option, _ in chosen}:
                found.append(Change(_options(chosen), change.memory.total))
        shorter = _shorter(plan, answer) if count == 1 else None
        if shorter and len(found) < MOST:
            found.append(shorter)
    if not found:
        pairs = (chosen for count in (1, 2, 3) for chosen in combinations(single, count))
        shortened = next(filter(None, (_shorter(plan, answer, chosen) for chosen in pairs)), None)
        found += [shortened] if shortened else []
    # --memory would stay with another chip, too.
    larger = None if plan.question.memory else _larger_chip(plan)
    if larger and len(found) < MOST:
        found.append(larger)
    return tuple(found)


def _changes(plan: Plan) -> Iterator[_Changed]:
    question = plan.question
    if plan.target == "aipc" and question.flavour == "stock" and plan.device == "CPU":
        if question.kv_cache == "fp32":  # which the native flavour does not keep
            yield "--flavour native and --kv-cache fp16", {"flavour": "native", "kv_cache": "fp16"}
        else:
            yield "--flavour native", {"flavour": "native"}
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


def _shorter(
    plan: Plan, answer: Callable[[Question], Plan], chosen: tuple[_Changed, ...] = ()
) -> Change | None:
    """The longest context that fits, in whole blocks of 256, with other changes."""
    low, high, best = SHORTEST // BLOCK - 1, plan.context // BLOCK, None
    while low < high:
        middle = (low + high + 1) // 2
        tried = _tried(plan, answer, {**_fields(chosen), "context": middle * BLOCK})
        low, high, best = (middle, high, tried) if tried else (low, middle - 1, best)
    if best is None:
        return None
    return Change(_options((*chosen, (f"--max-context {best.context}", {}))), best.memory.total)


def _fields(chosen: tuple[_Changed, ...]) -> dict[str, object]:
    return dict(pair for _, fields in chosen for pair in fields.items())


def _options(chosen: tuple[_Changed, ...]) -> str:
    return " and ".join(option for option, _ in chosen)


def _larger_chip(plan: Plan) -> Change | None:
    """The smallest chip of the same kind with enough memory."""
    room = [
        each for each in chips().values()
        if each.kind == plan.chip.kind
        and each.id != plan.chip.id
        and (each.memory_bytes or 0) > (plan.chip.memory_bytes or 0)
        and (each.usable_bytes or 0) >= plan.memory.total
    ]  # fmt: skip
    if not room:
        return None
    smallest = min(room, key=lambda each: each.usable_bytes or 0)
    return Change(f"--chip {smallest.id}", plan.memory.total)
