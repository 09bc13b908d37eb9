from __future__ import annotations

import gc
import threading

import pytest

from cpm_edge.plugins.native import NativeError
from cpm_edge.plugins.session import NativeSession
from cpm_edge.plugins.sparse_attention.cache import AttentionCache
from cpm_edge.plugins.sparse_attention.spec import SparseAttentionSpec
from tests.support.threads import await_end, needs_proc, thread_ids

CACHE = AttentionCache.empty(SparseAttentionSpec.dense(4, 2, 0.25), 1, 64, 16)


def test_a_closed_session_is_refused() -> None:
    session = NativeSession(threads=2, layers=1)
    session.set_cache(0, CACHE)
    with session.step():
        assert session.address
    session.close()
    session.close()
    with pytest.raises(NativeError, match="the native session is closed"):
        session.set_cache(0, CACHE)
    with pytest.raises(NativeError, match="the native session is closed"), session.step():
        pass


def test_a_layer_that_the_session_does_not_have() -> None:
    session = NativeSession(threads=1, layers=2)
    for layer in (-1, 2):
        with pytest.raises(NativeError, match="cpm_session_set_cache"):
            session.set_cache(layer, CACHE)
    session.close()


def test_closing_in_the_middle_of_a_step() -> None:
    """As a signal handler may do, in the thread that runs the step."""
    session = NativeSession(threads=3, layers=1)
    with session.step():
        session.close()


def test_another_thread_closes_after_the_step() -> None:
    session = NativeSession(threads=3, layers=1)
    closing = threading.Thread(target=session.close)
    with session.step():
        closing.start()
        closing.join(0.05)
        assert closing.is_alive()
    closing.join(60)
    assert not closing.is_alive()


@needs_proc
def test_a_forgotten_session_joins_its_threads() -> None:
    usual = thread_ids()
    session = NativeSession(threads=4, layers=1)
    own = thread_ids() - usual
    assert len(own) == 3
    del session
    gc.collect()
    await_end(own)
