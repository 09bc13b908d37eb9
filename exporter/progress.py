"""Progress on stderr: a bar for the weights, a spinner for the rest, nothing when nobody watches."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

from rich.console import Console
from rich.progress import (
    BarColumn,
    SpinnerColumn,
    TaskProgressColumn,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.progress import Progress as Bar


class Progress:
    """Shows what an export is doing.

    Args:
        enabled: None shows it when stderr is a terminal.
    """

    def __init__(self, enabled: bool | None = None) -> None:
        self._console = Console(stderr=True)
        self._enabled = self._console.is_terminal if enabled is None else enabled
        self._bar: Bar | None = None

    @contextlib.contextmanager
    def stage(self, text: str) -> Iterator[None]:
        """A stage of unknown length."""
        if not self._enabled:
            yield
            return
        columns = (SpinnerColumn(), TextColumn("{task.description}"), TimeElapsedColumn())
        with Bar(*columns, console=self._console) as bar:
            task = bar.add_task(text, total=None)
            yield
            bar.update(task, total=1, completed=1)

    @contextlib.contextmanager
    def weights(self, text: str, elements: int) -> Iterator[None]:
        """A stage that goes through the weights, ``elements`` in all."""
        if not self._enabled:
            yield
            return
        columns = (
            SpinnerColumn(),
            TextColumn("{task.description}"),
            BarColumn(),
            TaskProgressColumn(),
            TimeRemainingColumn(),
            TimeElapsedColumn(),
        )
        with Bar(*columns, console=self._console) as self._bar:
            self._bar.add_task(text, total=elements)
            yield
        self._bar = None

    def advance(self, elements: int) -> None:
        """Count weight elements as done."""
        if self._bar is not None:
            self._bar.update(self._bar.task_ids[0], advance=elements)
