"""Our runtime, either flavour."""

from __future__ import annotations

import time

import numpy as np

from cpm_edge.benchmarks.peers.peer import FIRST_TOKEN, PROMPT_SEED
from cpm_edge.runtimes.session import Engine, Session


class OurPeer:
    """An engine of ours; sequences that were prefilled for decoding are kept for the next repeat.

    Args:
        label: its row in the table.
        engine: closed with this peer.
        vocab_size: prompts are random tokens.
    """

    def __init__(self, label: str, engine: Engine, vocab_size: int) -> None:
        self.label = label
        self.engine = engine
        self._vocab_size = vocab_size
        self._fresh: Session | None = None
        self._filled: dict[int, Session] = {}

    def prefill(self, tokens: int) -> float:
        prompt = self._prompt(tokens)
        if self._fresh is None:
            self._fresh = self.engine.session()
            self._fresh.forward(prompt)
        self._fresh.reset()
        start = time.perf_counter()
        self._fresh.forward(prompt)
        return tokens / (time.perf_counter() - start)

    def decode(self, context: int, new_tokens: int) -> float:
        session = self._filled.get(context)
        if session is None:
            session = self._filled[context] = self.engine.session()
            session.forward(self._prompt(context))
        return decode_rate(session, new_tokens)

    def close(self) -> None:
        for session in [*self._filled.values(), *([self._fresh] if self._fresh else [])]:
            session.close()
        self._filled.clear()
        self._fresh = None
        self.engine.close()

    def _prompt(self, tokens: int) -> list[int]:
        rng = np.random.default_rng(PROMPT_SEED)
        return [int(token) for token in rng.integers(FIRST_TOKEN, self._vocab_size, tokens)]


def decode_rate(session: Session, new_tokens: int) -> float:
    """Tokens a second of ``new_tokens`` steps, after one that is not timed; takes all of them back."""
    session.forward([FIRST_TOKEN])
    session.rewind(1)
    start = time.perf_counter()
    for token in range(new_tokens):
        session.forward([FIRST_TOKEN + token % 64])
    seconds = time.perf_counter() - start
    session.rewind(new_tokens)
    return new_tokens / seconds
