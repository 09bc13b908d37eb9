"""The one exception of the quantizer.

It stands alone, without the toolkit's other errors, so that this package needs numpy and nothing else.
"""

from __future__ import annotations


class QuantError(ValueError):
    """A tensor or a setting that cannot be quantized as asked.

    Args:
        message: what went wrong, what was expected and what was found.
        hint: the next step for the user, if there is one.
        row: the first offending row, counted within the block of rows that was passed in.
    """

    def __init__(self, message: str, *, hint: str | None = None, row: int | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint
        self.row = row
