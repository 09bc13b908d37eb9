"""The chip profiles that come with the toolkit: ``chips()`` all of them, ``chip(id)`` one."""

from __future__ import annotations

import difflib
import functools
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType

from cpm_edge.benchmarks.plan.chip import Chip, read_chip
from cpm_edge.benchmarks.plan.errors import PlanError

FOLDER = Path(__file__).parent / "chips"


@functools.cache
def chips() -> Mapping[str, Chip]:
    """Every profile by its id, in the order of ids.

    Raises:
        PlanError: a profile breaks the schema.
    """
    found = {path.stem: read_chip(path) for path in sorted(FOLDER.glob("*.json"))}
    for name, each in found.items():
        if each.id != name:
            raise PlanError(f"{name}.json: id: expected the name of the file, got {each.id!r}")
    return MappingProxyType(found)


def chip(name: str) -> Chip:
    """The profile with this id.

    Raises:
        PlanError: there is none.
    """
    try:
        return chips()[name]
    except KeyError:
        near = difflib.get_close_matches(name, chips(), 3, 0.4)
        raise PlanError(
            f"--chip: expected one of {', '.join(chips())}, got {name}",
            hint=f"did you mean {' or '.join(near)}?" if near else "see cpm-bench chips",
        ) from None
