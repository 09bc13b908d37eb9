"""The one exception of the plan; it stands alone, so that this package needs numpy and nothing else."""

from __future__ import annotations


class PlanError(ValueError):
    """A chip, a config or a question that cannot be planned.

    Args:
        message: what went wrong, what was expected and what was found.
        hint: the next step for the user, if there is one.
    """

    def __init__(self, message: str, *, hint: str | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint
