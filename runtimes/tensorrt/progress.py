"""The builder's phases as a rich progress bar on a terminal."""

from __future__ import annotations

import sys
import threading
from types import TracebackType
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeElapsedColumn

if TYPE_CHECKING:
    import tensorrt as trt


class BuildProgress:
    """Context manager around a build.

    Attributes:
        monitor: an IProgressMonitor for the builder config.
        interrupted: Ctrl-C came and the builder was asked to stop.

    Args:
        module: tensorrt or tensorrt_rtx.
    """

    def __init__(self, module: Any) -> None:
        self.interrupted = False
        console = Console(stderr=True)
        self._bar = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            TextColumn("{task.completed:.0f}/{task.total:.0f}"),
            TimeElapsedColumn(),
            console=console,
            transient=True,
            disable=not sys.stderr.isatty(),
        )
        self._tasks: dict[str, TaskID] = {}
        self._lock = threading.Lock()  # the builder reports from several threads
        self.monitor: trt.IProgressMonitor = _make_monitor(module, self)

    def __enter__(self) -> BuildProgress:
        self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._bar.stop()

    def begin(self, phase: str, parent: str | None, steps: int) -> None:
        """A phase begins, perhaps inside another one."""
        with self._lock:
            indent = "  " if parent else ""
            self._tasks[phase] = self._bar.add_task(f"{indent}{phase}", total=max(1, steps))

    def advance(self, phase: str, step: int) -> None:
        """Step number ``step`` of a phase is done."""
        with self._lock:
            if phase in self._tasks:
                self._bar.update(self._tasks[phase], completed=step + 1)

    def end(self, phase: str) -> None:
        """A phase ends; its line goes."""
        with self._lock:
            if phase in self._tasks:
                self._bar.remove_task(self._tasks.pop(phase))


def _make_monitor(module: Any, progress: BuildProgress) -> trt.IProgressMonitor:
    # An exception must not cross the builder's C++ frames. Ctrl-C reaches whichever of these runs next.
    class Monitor(module.IProgressMonitor):  # type: ignore[misc]  # the base class is known at run time only
        def __init__(self) -> None:
            module.IProgressMonitor.__init__(self)

        def phase_start(self, phase_name: str, parent_phase: str | None, num_steps: int) -> None:
            try:
                progress.begin(phase_name, parent_phase, num_steps)
            except KeyboardInterrupt:
                progress.interrupted = True

        def step_complete(self, phase_name: str, step: int) -> bool:
            try:
                progress.advance(phase_name, step)
            except KeyboardInterrupt:
                progress.interrupted = True
            return not progress.interrupted

        def phase_finish(self, phase_name: str) -> None:
            try:
                progress.end(phase_name)
            except KeyboardInterrupt:
                progress.interrupted = True

    monitor: trt.IProgressMonitor = Monitor()
    return monitor
