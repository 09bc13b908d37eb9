"""The one exception of the quantizer.

It stands alone, without the toolkit's other errors, so that this package needs numpy and nothing else.
"""

from __future__ import annotations


class QuantError(ValueError):
    """A tensor or a setting that cannot be quantized as asked.

    Args:
        text: what went wrong, what was expected and what was found; with ``row``, what that row does.
        hint: the next step for the user, if there is one.
        row: the first offending row, counted within the block of rows that was passed in.

    Attributes:
        message: the text, behind its row.
    """

    def __init__(self, text: str, *, hint: str | None = None, row: int | None = None) -> None:
        self.message = text if row is None else f"row {row} {text}"
        super().__init__(self.message)
        self.text = text
        self.hint = hint
        self.row = row
