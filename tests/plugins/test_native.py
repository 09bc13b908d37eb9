from __future__ import annotations

import gc
import os
import subprocess
import sys
import threading

import numpy as np
import pytest

from cpm_edge.plugins import native as library
from cpm_edge.plugins.matmul_nbits import native
from cpm_edge.plugins.matmul_nbits.spec import NBitsShape
from cpm_edge.plugins.native import NativeError, ThreadPool
from tests.support.threads import await_end, needs_proc, thread_ids

SHAPE = NBitsShape(512, 128, 4, 32)


def panels() -> np.ndarray:
    rng = np.random.default_rng(0)
    codes = rng.integers(0, 256, (512, 64)).astype(np.uint8)
    return native.pack(SHAPE, codes, rng.standard_normal((512, 4)).astype(np.float16), None)


def test_two_pools_at_once_do_not_disturb_each_other() -> None:
    packed, failures = panels(), []
    x = np.random.default_rng(1).standard_normal((3, 128)).astype(np.float32)
    with ThreadPool(1) as pool:
        expected = native.matmul(pool, SHAPE, packed, x)

    def work() -> None:
        with ThreadPool(3) as pool:
            for _ in range(50):
                if not np.array_equal(native.matmul(pool, SHAPE, packed, x), expected):
                    failures.append(1)

    workers = [threading.Thread(target=work) for _ in range(3)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join(timeout=60)
        assert not worker.is_alive()
    assert not failures


def test_one_pool_shared_by_two_threads() -> None:
    packed, failures = panels(), []
    x = np.random.default_rng(1).standard_normal((2, 128)).astype(np.float32)
    with ThreadPool(2) as pool:
        expected = native.matmul(pool, SHAPE, packed, x)

        def work() -> None:
            for _ in range(50):
                if not np.array_equal(native.matmul(pool, SHAPE, packed, x), expected):
                    failures.append(1)

        workers = [threading.Thread(target=work) for _ in range(2)]
        for worker in workers:
            worker.start()
        for worker in workers:
            worker.join(timeout=60)
            assert not worker.is_alive()
    assert not failures


@pytest.mark.parametrize("closing", ["pool.close()", "pass"])
def test_the_process_exits(closing: str) -> None:
    """Also with workers that still spin after a step, and with a pool that nobody closed."""
    code = f"""
from cpm_edge.plugins.native import ThreadPool, library
pool = ThreadPool(4)
library().cpm_pool_begin_step(pool.handle)
{closing}
print("done")
"""
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=20, check=True
    )
    assert done.stdout == "done\n"


def test_a_closed_pool_is_refused() -> None:
    packed, x = panels(), np.ones((1, 128), np.float32)
    pool = ThreadPool(3)
    native.matmul(pool, SHAPE, packed, x)
    pool.close()
    pool.close()
    with pytest.raises(NativeError, match="the thread pool is closed"):
        native.matmul(pool, SHAPE, packed, x)


@needs_proc
def test_a_forgotten_pool_joins_its_threads() -> None:
    usual = thread_ids()
    pool = ThreadPool(4)
    own = thread_ids() - usual
    assert len(own) == 3
    del pool
    gc.collect()
    await_end(own)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system does not fork")
def test_a_fork_can_neither_use_nor_hang_on_a_pool() -> None:
    code = """
import os, sys
from cpm_edge.plugins.native import NativeError, ThreadPool
pool = ThreadPool(4)
child = os.fork()
if child == 0:
    try:
        pool.handle
    except NativeError as error:
        assert "of which this one is a fork" in str(error)
        pool.close()
        sys.exit(7)
    sys.exit(1)
assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 7
assert pool.handle
"""
    command = [sys.executable, "-W", "ignore", "-c", code]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr


def test_a_missing_library_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(library, "library_path", lambda: None)
    library.library.cache_clear()
    try:
        with pytest.raises(NativeError, match="were not built"):
            library.library()
    finally:
        library.library.cache_clear()
