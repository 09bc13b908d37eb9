"""Mixed precision: the matrices whose outputs suffer most from four bits get eight."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from rich.table import Table


@dataclass(frozen=True)
class Sensitivity:
    """What four bits do to one matrix.

    Attributes:
        name: of the tensor.
        error: squared output error relative to the squared output.
        weights: of the matrix.
        kept: whether it stays int8.
    """

    name: str
    error: float
    weights: int
    kept: bool


def choose_precision(
    errors: Mapping[str, float], weights: Mapping[str, int], ratio: float
) -> list[Sensitivity]:
    """All matrices, the most sensitive first; as many stay int8 as ``1 - ratio`` of all weights allow.

    Args:
        errors: relative output errors at four bits, by tensor name.
        weights: of each matrix.
        ratio: share of all weights that becomes int4.
    """
    ranked = sorted(errors, key=lambda name: (-errors[name], name))
    budget = (1 - ratio) * sum(weights[name] for name in ranked)
    chosen = []
    for name in ranked:
        keep = weights[name] <= budget
        budget -= weights[name] if keep else 0
        chosen.append(Sensitivity(name, errors[name], weights[name], keep))
    return chosen


def precision_table(rows: list[Sensitivity]) -> Table:
    """The choice, one line a matrix; of those that became int4 only the ten most sensitive."""
    table = Table("tensor", "output error at int4", "stored as", title="Mixed precision")
    kept = [row for row in rows if row.kept]
    others = [row for row in rows if not row.kept]
    for row in kept + others[:10]:
        table.add_row(row.name, f"{row.error:.3%}", "int8" if row.kept else "int4")
    if len(others) > 10:
        table.add_row(f"{len(others) - 10} others", f"up to {others[10].error:.3%}", "int4")
    return table
