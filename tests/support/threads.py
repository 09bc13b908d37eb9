"""The threads of this process, native ones too, as Linux lists them."""

from __future__ import annotations

import time
from pathlib import Path

import pytest

TASKS = Path("/proc/self/task")
needs_proc = pytest.mark.skipif(not TASKS.is_dir(), reason="looks for threads in /proc")


def thread_ids() -> set[str]:
    return {task.name for task in TASKS.iterdir()}


def await_end(threads: set[str], patience: float = 30.0) -> None:
    """Wait for threads to leave the list, which they do a moment after they were joined."""
    deadline = time.monotonic() + patience
    while left := threads & thread_ids():
        assert time.monotonic() < deadline, f"{len(left)} of {len(threads)} threads go on"
        time.sleep(0.001)
