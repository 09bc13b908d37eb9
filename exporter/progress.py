"""Progress on stderr: bars and spinners on a terminal, a line a minute in a log."""

from __future__ import annotations

import contextlib
import datetime
import time
from collections.abc import Iterator

import click
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

LINE_SECONDS = 60.0


class Progress:
    """Shows what an export is doing.

    Args:
        enabled: None shows it, on a terminal as it moves, else as a line of text a minute.
    """

    def __init__(self, enabled: bool | None = None) -> None:
        self._console = Console(stderr=True)
        self._moves = self._console.is_terminal if enabled is None else enabled
        self._logs = enabled is None and not self._moves
        self._bar: Bar | None = None
        self._line: _Line | None = None

    @contextlib.contextmanager
    def stage(self, text: str) -> Iterator[None]:
        """A stage of unknown length."""
        if not self._moves:
            if self._logs:
                _Line(text).print()
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
        if not self._moves:
            self._line = _Line(text, elements) if self._logs else None
            yield
            self._line = None
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
        elif self._line is not None:
            self._line.advance(elements)


class _Line:
    """Text in place of a bar: one line, whatever stage it is about, in ``LINE_SECONDS``."""

    _last = time.monotonic()

    def __init__(self, text: str, total: int = 0) -> None:
        self._text = text
        self._total = total
        self._done = 0
        self._mark: tuple[float, int] | None = None  # when the last line was printed, and what was done then

    def advance(self, elements: int) -> None:
        self._done += elements
        self.print()

    def print(self) -> None:
        now = time.monotonic()
        if now - _Line._last < LINE_SECONDS:
            return
        _Line._last = now
        rest = f": {self._done / self._total:.0%}" if self._total else ""
        if self._mark is not None and self._done > self._mark[1]:
            # From line to line, since what an earlier run had finished was counted in no time.
            seconds = (now - self._mark[0]) / (self._done - self._mark[1]) * (self._total - self._done)
            rest += f", {datetime.timedelta(seconds=round(seconds))} left"
        self._mark = now, self._done
        click.echo(f"{self._text}{rest}", err=True)
