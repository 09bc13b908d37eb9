"""Going back in a sequence whose state cannot drop tokens."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from cpm_edge.runtimes import session as session_module
from cpm_edge.runtimes import snapshots
from cpm_edge.runtimes.errors import BackendError
from cpm_edge.runtimes.generate import Stream
from cpm_edge.runtimes.options import GenerationOptions
from cpm_edge.runtimes.session import FloatArray, Logits, Session, TokenArray
from cpm_edge.runtimes.snapshots import MOST, Snapshots, States
from cpm_edge.runtimes.tokenizer import Tokenizer
from tests.runtimes.fakes import FakeSession, byte_level_tokenizer, reference_row

VOCAB = 11
MIB = 1 << 20


class RecurrentSession(FakeSession):
    """A cache and a state of the same tokens; logits are only right when the two agree."""

    def __init__(self, interval: int = 5, limit: int = 3) -> None:
        super().__init__(VOCAB, max_context=400)
        self.state = np.zeros(2, np.int64)
        self.interval = interval
        self._snapshots = Snapshots(16)
        self._snapshots.limit = limit

    def _step(self, tokens: TokenArray, logits: Logits) -> FloatArray:
        rows = []
        for token in tokens.tolist():
            # In place and before the cache, as kernels do it: a failure leaves them apart.
            self.state[:] = self.state[0] + 1, (self.state[1] * 31 + token + 1) % 2**31
            rows.append(super()._step(np.array([token]), logits)[0])
            assert self.state.tolist() == digest(self.cache), "the state does not belong to the cache"
        return np.stack(rows if logits == "all" else rows[-1:])

    def _save_states(self) -> States:
        return [self.state.copy()]  # type: ignore[list-item]

    def _load_states(self, states: States | None) -> None:
        self.state[:] = 0 if states is None else states[0]

    def _clone(self) -> Session:
        twin = RecurrentSession()
        twin.cache, twin.state = list(self.cache), self.state.copy()
        return twin


def digest(tokens: list[int]) -> list[int]:
    value = 0
    for token in tokens:
        value = (value * 31 + token + 1) % 2**31
    return [len(tokens), value]


@pytest.fixture(autouse=True)
def short_interval(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(session_module, "INTERVAL", 5)


ACTIONS = st.lists(
    st.one_of(
        st.lists(st.integers(0, VOCAB - 1), min_size=1, max_size=25),
        st.floats(0, 1),  # rewind by that share
        st.sampled_from(["fork", "fail", "reset"]),
    ),
    max_size=12,
)


@settings(deadline=None)
@given(ACTIONS)
def test_whatever_happened_before_the_logits_are_those_of_the_tokens(actions: list[Any]) -> None:
    session: Any = RecurrentSession()
    expected: list[int] = []
    for action in actions:
        if isinstance(action, list):
            rows = session.forward(action, logits="all")
            expected += action
            for i in range(len(action)):
                stop = len(expected) - len(action) + i + 1
                np.testing.assert_array_equal(rows[i], reference_row(expected[:stop], VOCAB))
        elif isinstance(action, float):
            n = int(action * len(expected))
            session.rewind(n)
            del expected[len(expected) - n :]
        elif action == "fork":
            kept, session = session, session.fork()
            kept.forward([1, 2])  # must not reach the twin
        elif action == "reset":
            session.reset()
            expected.clear()
        else:
            session.fail_at = (session.position - session.pending + 2, KeyboardInterrupt())
            with pytest.raises(KeyboardInterrupt):
                session.forward([3, 1, 4, 1])
            session.fail_at = None
            del expected[session.position :]
            expected += [3, 1, 4, 1][: session.position - len(expected)]
        assert session.tokens == expected and session.position == len(expected)
        assert session.snapshot_bytes() <= 3 * 16
        assert all(position <= len(expected) for position in session._snapshots.positions)
    np.testing.assert_array_equal(session.forward([7]), reference_row([*expected, 7], VOCAB))


def test_where_snapshots_are_taken() -> None:
    """Every 5 tokens at least, as the chunks of 4 allow, and before and after a prompt."""
    session = RecurrentSession(limit=100)
    session.forward([1] * 10)
    assert session._snapshots is not None
    assert session._snapshots.positions == [8, 10]
    session.forward([2])
    assert session._snapshots.positions == [8, 10]
    session.forward([3, 4, 5])
    assert session._snapshots.positions == [8, 10, 11, 14]
    for _ in range(7):
        session.forward([6])
    assert session._snapshots.positions == [8, 10, 11, 14, 19]


def test_going_back_to_a_snapshot_computes_nothing_again() -> None:
    session = RecurrentSession(limit=100)
    session.forward([1] * 10)
    session.forward([2])
    session.steps.clear()
    session.rewind(1)
    assert session.pending == 0 and session.steps == []
    session.rewind(1)
    assert (session.position, session.pending) == (9, 1)
    session.forward([5])
    assert session.steps == [1, 1] and session.pending == 0


def test_tokens_left_to_compute_again_may_be_dropped_too() -> None:
    session = RecurrentSession(limit=1)
    session.forward([1, 2, 3, 4, 5, 6, 7])
    session.rewind(1)
    assert session.pending == 6  # the only snapshot was at 7
    session.rewind(3)
    assert (session.tokens, session.pending) == ([1, 2, 3], 3)
    session.reset()
    assert (session.tokens, session.pending) == ([], 0)


def test_a_failure_while_computing_again_loses_nothing() -> None:
    session = RecurrentSession(limit=1)
    session.forward([1, 2, 3, 4, 5, 6, 7])
    session.rewind(1)
    session.fail_at = (2, RuntimeError("engine"))
    with pytest.raises(RuntimeError, match="engine"):
        session.forward([8])
    assert session.tokens == [1, 2, 3, 4, 5, 6] and not session.closed
    np.testing.assert_array_equal(session.forward([8]), reference_row([1, 2, 3, 4, 5, 6, 8], VOCAB))


def test_sessions_without_states_keep_none() -> None:
    session = FakeSession(VOCAB)
    session.forward([1, 2, 3])
    session.rewind(2)
    assert session.snapshot_bytes() == session.pending == 0
    with pytest.raises(NotImplementedError, match="FakeSession does not show its states"):
        session.layer_state(0)


def test_what_is_computed_again_does_not_count_as_cached() -> None:
    """The conversation so far is known, but the only snapshot lies behind what both share."""
    session = RecurrentSession(limit=1)
    session.forward(range(9))
    session.forward([9])
    prompt = [*range(10), 3, 4]
    tokenizer = Tokenizer(byte_level_tokenizer(), {}, [1])
    options = GenerationOptions(max_new_tokens=1, temperature=0.0)
    first = Stream(session, tokenizer, prompt, options, release=lambda _: None)
    list(first)
    assert first.result.stats.cached_tokens == 10
    again = Stream(session, tokenizer, prompt, options)
    list(again)
    # 11 tokens are shared; the snapshot is of 12.
    assert again.result.stats.cached_tokens == 0
    assert again.result.token_ids == first.result.token_ids


@pytest.mark.parametrize(("state_bytes", "limit"), [(48 * MIB, 5), (1, MOST), (16 * MIB, 16), (300 * MIB, 1)])
def test_the_budget_is_in_bytes(state_bytes: int, limit: int) -> None:
    kept = Snapshots(state_bytes)
    assert kept.limit == limit
    for position in range(1, 100):
        kept.add(position, [])
    assert len(kept.positions) == limit and kept.nbytes == limit * state_bytes
    assert kept.nbytes <= max(snapshots.BUDGET, state_bytes)


@pytest.mark.parametrize(("state_bytes", "times", "slack"), [(16 * MIB, 4, 2), (48 * MIB, 12, 20)])
@given(steps=st.lists(st.integers(1, 600), min_size=20, max_size=300))
@example(steps=[100] * 300)
def test_they_get_denser_towards_the_end(state_bytes: int, times: int, slack: int, steps: list[int]) -> None:
    """Going back by d computes at most a few times d again, for any d; more so when only five are kept.

    A search for the worst steps found half of the slack.
    """
    kept = Snapshots(state_bytes)
    end = 0
    for step in steps:
        end += step
        kept.add(end, [])
    assert kept.newest == end
    for back in (3**n for n in range(10)):
        if back < end:
            again = end - back - kept.at_most(end - back)[0]
            assert again <= times * back + slack * max(steps)


def test_forgetting_and_copying() -> None:
    kept = Snapshots(1)
    states: dict[int, States] = {p: [np.full(1, p, np.float32)] for p in (3, 6, 9)}
    for position, state in states.items():
        kept.add(position, state)
    twin = kept.copy()
    kept.forget_after(6)
    assert (kept.positions, twin.positions) == ([3, 6], [3, 6, 9])
    assert kept.at_most(8) == (6, states[6]) and kept.at_most(2) == (0, None)


def test_a_clone_that_cannot_load_its_states_is_closed() -> None:
    session = RecurrentSession()
    session.forward([1, 2, 3])
    session.fail_at = (3, RuntimeError("engine"))

    def broken(states: States | None) -> None:
        raise RuntimeError("device lost")

    session._load_states = broken  # type: ignore[method-assign]
    with pytest.raises(RuntimeError, match="device lost"):
        session.forward([4])
    assert session.closed
    with pytest.raises(BackendError, match="closed"):
        session.forward([4])
