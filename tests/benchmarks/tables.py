"""Reading rich tables back."""

from __future__ import annotations

from rich.table import Table


def cells(table: Table) -> list[list[str]]:
    """The rows of a table as text."""
    return [
        [str(cell) for cell in row] for row in zip(*(column.cells for column in table.columns), strict=True)
    ]
