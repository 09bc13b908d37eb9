"""What every engine is asked for."""

from __future__ import annotations

from typing import Protocol

PROMPT_SEED = 0
FIRST_TOKEN = 3  # ids below are special in the random tokenizer


class Peer(Protocol):
    """One engine with one model.

    Attributes:
        label: its row in the table.
    """

    label: str

    def prefill(self, tokens: int) -> float:
        """Tokens a second of a fresh sequence of ``tokens``, logits for the last one only."""

    def decode(self, context: int, new_tokens: int) -> float:
        """Tokens a second of ``new_tokens`` decode steps that start with ``context`` tokens in the cache."""

    def close(self) -> None:
        """Release everything."""
