"""Work on the row blocks of a tensor: done ahead on every core, errors with the tensor and the true row."""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from types import TracebackType
from typing import TypeVar

from cpm_edge.exporter.errors import CheckpointError
from cpm_edge.quant import QuantError

Result = TypeVar("Result")

WORKERS = min(os.cpu_count() or 1, 8)


def run_ahead(name: str, jobs: Iterator[tuple[int, Callable[[], Result]]]) -> Iterator[Result]:
    """Results of a tensor's jobs (first row, work) in order, done ahead on every core."""

    def naming(start: int, work: Callable[[], Result]) -> Result:
        with named(name, start):
            return work()

    ahead: deque[Future[Result]] = deque()
    with ThreadPoolExecutor(WORKERS) as pool:
        for start, work in jobs:
            ahead.append(pool.submit(naming, start, work))
            if len(ahead) > WORKERS:
                yield ahead.popleft().result()
        while ahead:
            yield ahead.popleft().result()


class named:  # noqa: N801 - reads as a statement: with named(name, row)
    """Puts the tensor's name and the true row into a QuantError."""

    def __init__(self, name: str, start: int) -> None:
        self._name = name
        self._start = start

    def __enter__(self) -> None:
        return None

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if isinstance(error, QuantError):
            row = "" if error.row is None else f" row {self._start + error.row}"
            raise CheckpointError(f"tensor {self._name}:{row} {error.text}", hint=error.hint) from error
