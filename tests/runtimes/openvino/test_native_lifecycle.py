"""Threads and caches of native sessions: who owns them, when they end, and that none disturbs another."""

from __future__ import annotations

import gc
import os
import subprocess
import sys
import threading
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from cpm_edge.runtimes import open_engine
from cpm_edge.runtimes.errors import BackendError
from cpm_edge.runtimes.openvino.front import RotaryTables
from cpm_edge.runtimes.session import Engine, FloatArray, Session
from tests.support.bundles import NATIVE, Bundles
from tests.support.checkpoints import prompt
from tests.support.threads import await_end, needs_proc, thread_ids

LONG, SHORT = prompt(230, seed=1), prompt(41, seed=2)
# Generous: it only has to tell a slow process from one that hangs.
PATIENCE = 120


def with_threads(bundles: Bundles, threads: int) -> Engine:
    return open_engine(bundles.open("sparse", "aipc", **NATIVE), threads=threads)


def steps(session: Session, tokens: Any) -> list[FloatArray]:
    """Logits of a prompt in two pieces and of single tokens, some of them again after a rewind."""
    found = [session.forward(tokens[:20]), session.forward(tokens[20:-8])]
    found += [session.forward([token]) for token in tokens[-8:]]
    session.rewind(3)
    return [*found, *(session.forward([token]) for token in tokens[-3:])]


def in_threads(*works: Callable[[], None]) -> None:
    """Run all at once; what one of them raises is raised here."""
    failures: list[BaseException] = []

    def guarded(work: Callable[[], None]) -> None:
        try:
            work()
        except BaseException as error:  # noqa: BLE001 - raised again below
            failures.append(error)

    threads = [threading.Thread(target=guarded, args=(work,), daemon=True) for work in works]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(PATIENCE)
        assert not thread.is_alive()
    if failures:
        raise failures[0]


@pytest.mark.parametrize("threads", [1, 2, 3])
def test_two_sessions_in_turn_and_at_once_answer_as_alone(bundles: Bundles, threads: int) -> None:
    engine = with_threads(bundles, threads)
    alone = {}
    for name, tokens in (("long", LONG), ("short", SHORT)):
        with engine.session() as session:
            alone[name] = steps(session, tokens)

    with engine.session() as first, engine.session() as second:
        for one, other in zip(LONG[:12], SHORT[:12], strict=True):
            first.forward([one])
            second.forward([other])
        first.reset()
        second.reset()

        def check(session: Session, name: str, tokens: Any) -> None:
            for _ in range(3):
                for expected, got in zip(alone[name], steps(session, tokens), strict=True):
                    np.testing.assert_array_equal(got, expected)
                session.reset()

        check(first, "long", LONG)
        check(second, "short", SHORT)
        in_threads(lambda: check(first, "long", LONG), lambda: check(second, "short", SHORT))


def branches(engine: Engine) -> list[FloatArray]:
    """Logits of forks that go on, while the session they come from is rewound and goes on too."""
    found = []
    with engine.session() as trunk:
        trunk.forward(LONG[:-9])
        for start in (0, 3, 6):
            with trunk.fork() as twin:
                trunk.rewind(5)
                found += [twin.forward([token]) for token in SHORT[start : start + 4]]
                found.append(trunk.forward(LONG[-14:-9]))
                twin.reset()
                found.append(twin.forward(SHORT))
    return found


def test_forks_and_rewinds_while_another_session_runs(bundles: Bundles) -> None:
    engine = with_threads(bundles, 2)
    expected = branches(engine)
    with engine.session() as session:
        alone = steps(session, LONG)

    def branching() -> None:
        for known, got in zip(expected, branches(engine), strict=True):
            np.testing.assert_array_equal(got, known)

    def steady() -> None:
        with engine.session() as session:
            for _ in range(5):
                for known, got in zip(alone, steps(session, LONG), strict=True):
                    np.testing.assert_array_equal(got, known)
                session.reset()

    in_threads(branching, steady, branching)


@pytest.mark.parametrize("busy", ["prefill", "decode"])
def test_a_busy_session_does_not_starve_another(bundles: Bundles, busy: str) -> None:
    """The busy one goes on until the other one is through: were that to starve, the test would not end."""
    engine = with_threads(bundles, 2)
    done = threading.Event()

    def endless() -> None:
        with engine.session() as session:
            while not done.is_set():
                session.reset()
                session.forward(LONG if busy == "prefill" else LONG[:1])

    def finite() -> None:
        try:
            with engine.session() as session:
                steps(session, SHORT)
        finally:
            done.set()

    in_threads(endless, finite)


@needs_proc
def test_threads_end_with_the_session_closed_or_collected(bundles: Bundles) -> None:
    engine = with_threads(bundles, 4)
    with engine.session() as session:
        session.forward(SHORT)
    usual = thread_ids()
    session = engine.session()
    session.forward(SHORT)
    own = thread_ids() - usual
    twin = session.fork()
    own_of_twin = thread_ids() - usual - own
    assert (len(own), len(own_of_twin)) == (3, 3)
    session.close()
    await_end(own)
    assert twin.forward([1]).shape == (session.vocab_size,)
    del twin
    gc.collect()
    await_end(own_of_twin)


def test_closing_twice_and_use_after_it(bundles: Bundles) -> None:
    session = with_threads(bundles, 2).session()
    session.forward(SHORT)
    session.close()
    session.close()
    assert session.closed and session.cache_bytes() == 0
    uses: list[Callable[[], Any]] = [
        lambda: session.forward([1]), lambda: session.rewind(1), session.reset, session.fork,
    ]  # fmt: skip
    for use in uses:
        with pytest.raises(BackendError, match="this session is closed"):
            use()


def test_closing_waits_for_the_step_of_another_thread(bundles: Bundles) -> None:
    engine = with_threads(bundles, 2)
    for _ in range(10):
        session, started = engine.session(), threading.Event()

        def work(session: Session = session, started: threading.Event = started) -> None:
            with pytest.raises(BackendError, match="closed"):
                while True:
                    session.reset()
                    started.set()
                    session.forward(LONG)

        def close(session: Session = session, started: threading.Event = started) -> None:
            started.wait(PATIENCE)
            session.close()

        in_threads(work, close)


def test_closing_waits_for_all_of_a_decode_step(bundles: Bundles, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also for what comes before the kernels, which reads what a close removes; they then refuse to run."""
    session, write = with_threads(bundles, 2).session(), RotaryTables.write
    closing = threading.Thread(target=session.close)

    def while_closing(tables: RotaryTables, position: int, values: FloatArray) -> None:
        closing.start()
        closing.join(0.05)
        assert closing.is_alive()
        write(tables, position, values)

    monkeypatch.setattr(RotaryTables, "write", while_closing)
    with pytest.raises(BackendError, match="this session is closed"):
        session.forward([1])
    closing.join(PATIENCE)
    assert not closing.is_alive()


PROGRAM = """
import os, sys
from cpm_edge.runtimes import open_engine
from cpm_edge.runtimes.bundle import open_bundle
from cpm_edge.runtimes.errors import BackendError

engine = open_engine(open_bundle(sys.argv[1]), threads=4)
first, second = engine.session(), engine.session()
first.forward(range(1, 40))
second.forward([1])
"""
ENDINGS = {
    "closed": ("first.close(); second.close()", 0),
    "open": ("pass", 0),
    "exit": ("sys.exit(3)", 3),
    "exception": ("first.forward([-1])", 1),
    # The step of a daemon thread is under way while the interpreter ends.
    "daemon": (
        "import threading, time\n"
        "def work():\n"
        "    while True:\n"
        "        first.reset(); first.forward(range(1, 40))\n"
        "threading.Thread(target=work, daemon=True).start(); time.sleep(0.2)",
        0,
    ),
}


@pytest.mark.parametrize("ending", ENDINGS)
def test_a_process_with_sessions_exits(bundles: Bundles, ending: str) -> None:
    last, code = ENDINGS[ending]
    folder = bundles.open("sparse", "aipc", **NATIVE).path
    command = [sys.executable, "-c", PROGRAM + last + "\nprint('last line')", str(folder)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=PATIENCE, check=False)
    assert done.returncode == code, done.stderr
    assert ("PromptError" in done.stderr) is (ending == "exception"), done.stderr


FORK = """
child = os.fork()
if child == 0:
    for use in (lambda: first.forward([2]), second.fork, engine.session):
        try:
            use()
        except BackendError as error:
            assert "of which this one is a fork" in str(error) and "spawn" in error.hint, error
        else:
            raise AssertionError("a forked session was used")
    second.close()
    os._exit(7)  # as multiprocessing does: OpenVINO itself may wait for its lost threads on a normal exit
assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 7
first.forward([2])
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system does not fork")
def test_a_forked_child_is_refused_and_exits(bundles: Bundles) -> None:
    folder = bundles.open("sparse", "aipc", **NATIVE).path
    command = [sys.executable, "-W", "ignore", "-c", PROGRAM + FORK, str(folder)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=PATIENCE, check=False)
    assert done.returncode == 0, done.stderr
