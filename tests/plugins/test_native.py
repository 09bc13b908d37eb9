from __future__ import annotations

import subprocess
import sys
import threading

import numpy as np
import pytest

from cpm_edge.plugins import native as library
from cpm_edge.plugins.matmul_nbits import native
from cpm_edge.plugins.matmul_nbits.spec import NBitsShape
from cpm_edge.plugins.native import NativeError, ThreadPool

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


def test_a_missing_library_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(library, "library_path", lambda: None)
    library.library.cache_clear()
    try:
        with pytest.raises(NativeError, match="were not built"):
            library.library()
    finally:
        library.library.cache_clear()
