from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from cpm_edge.runtimes.errors import BackendError, ContextError, PromptError
from tests.runtimes.fakes import FakeSession, reference_row

VOCAB = 11
TOKENS = st.lists(st.integers(0, VOCAB - 1), min_size=1, max_size=30)


@given(TOKENS, st.integers(1, 7))
def test_chunks_do_not_change_the_logits(tokens: list[int], chunk: int) -> None:
    whole = FakeSession(VOCAB, chunk=lambda _: 100)
    parts = FakeSession(VOCAB, chunk=lambda _: chunk)
    rows = parts.forward(tokens, logits="all")
    assert rows.shape == (len(tokens), VOCAB)
    assert rows.dtype == np.float32
    np.testing.assert_array_equal(rows, whole.forward(tokens, logits="all"))
    assert max(parts.steps) <= chunk
    last = FakeSession(VOCAB, chunk=lambda _: chunk).forward(tokens)
    assert last.shape == (VOCAB,)
    np.testing.assert_array_equal(last, rows[-1])


def test_chunk_size_follows_the_position() -> None:
    session = FakeSession(VOCAB, chunk=lambda position: max(0, 8 - position))
    session.forward(range(11))
    assert session.steps == [8, 1, 1, 1]


@given(TOKENS, st.data())
def test_rewind_then_forward_equals_never_having_gone_there(tokens: list[int], data: st.DataObject) -> None:
    session = FakeSession(VOCAB)
    session.forward(tokens)
    n = data.draw(st.integers(0, len(tokens)))
    session.rewind(n)
    assert session.tokens == tokens[: len(tokens) - n]
    np.testing.assert_array_equal(session.forward([3]), reference_row([*session.tokens], VOCAB))


def test_fork_is_independent() -> None:
    session = FakeSession(VOCAB)
    session.forward([1, 2, 3])
    twin = session.fork()
    twin.forward([4])
    session.forward([5, 6])
    assert (session.tokens, twin.tokens) == ([1, 2, 3, 5, 6], [1, 2, 3, 4])
    session.reset()
    assert (session.position, twin.position) == (0, 4)


@pytest.mark.parametrize(
    "bad", [[], np.zeros((1, 2), int), [1.5], ["a"], [True], [-1], [VOCAB], [2**70], np.array([], int)]
)
def test_bad_tokens_are_refused_before_any_step(bad: Any) -> None:
    session = FakeSession(VOCAB)
    with pytest.raises(PromptError, match="token_ids: expected"):
        session.forward(bad)
    assert session.steps == []


def test_unsigned_and_narrow_integers_are_taken() -> None:
    for kind in (np.uint64, np.int8, np.uint16):
        session = FakeSession(VOCAB)
        session.forward(np.array([1, 2], kind))
        assert session.tokens == [1, 2]


def test_context_is_checked_before_any_step() -> None:
    session = FakeSession(VOCAB, max_context=10)
    session.forward([0] * 8)
    session.steps.clear()
    with pytest.raises(ContextError, match="3 tokens do not fit: 8 of 10"):
        session.forward([0] * 3)
    assert session.steps == []
    session.forward([0] * 2)
    assert session.position == 10


@pytest.mark.parametrize("error", [RuntimeError("engine"), KeyboardInterrupt()])
def test_a_failure_keeps_whole_chunks_only(error: BaseException) -> None:
    session = FakeSession(VOCAB)
    session.fail_at = (6, error)
    with pytest.raises(type(error)):
        session.forward(range(10))
    assert session.tokens == session.cache == [0, 1, 2, 3]
    session.forward([4, 5, 6])
    np.testing.assert_array_equal(session.forward([7]), reference_row(list(range(8)), VOCAB))


def test_a_failure_that_cannot_be_undone_closes_the_session(monkeypatch: pytest.MonkeyPatch) -> None:
    session = FakeSession(VOCAB)
    session.fail_at = (1, RuntimeError("engine"))

    def broken(position: int) -> None:
        raise RuntimeError("device lost")

    monkeypatch.setattr(session, "_truncate", broken)
    with pytest.raises(RuntimeError, match="device lost"):
        session.forward([1, 2, 3])
    assert session.closed
    assert session.released


def test_wrong_logit_shape_of_an_engine_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    session = FakeSession(VOCAB)
    monkeypatch.setattr(session, "_step", lambda tokens, logits: np.zeros((1, VOCAB + 1), np.float32))
    with pytest.raises(BackendError, match=r"expected shape \(1, 11\), got \(1, 12\)"):
        session.forward([1])
    assert session.position == 0


def test_rewind_range_and_closed_session() -> None:
    session = FakeSession(VOCAB)
    session.forward([1, 2])
    for n in (-1, 3):
        with pytest.raises(ContextError, match="rewind: expected"):
            session.rewind(n)
    with session:
        pass
    assert session.released
    session.close()
    for use in (lambda: session.forward([1]), lambda: session.rewind(0), session.fork, session.reset):
        with pytest.raises(BackendError, match="closed"):
            use()


def test_unknown_logits_mode() -> None:
    with pytest.raises(ValueError, match="expected 'last' or 'all'"):
        FakeSession(VOCAB).forward([1], logits="first")  # type: ignore[arg-type]
