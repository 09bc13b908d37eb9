"""How many tokens one engine step may take, from the memory that its attention scores need."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

BUDGET = 256 << 20  # bytes for score-sized temporaries
LONGEST = 512  # beyond this, larger steps no longer make prefill faster
ALIGNMENT = 16
SPARSE_COPIES = 6  # score-sized tensors that the portable body of cpm.SparseAttention keeps alive
LATENT_COPIES = 3  # and that of its latent form


def score_copies(attention: dict[str, Any], dense: int) -> int:
    """Score-sized tensors that are alive at once.

    Args:
        attention: the manifest's ``attention``.
        dense: of the engine's own attention, which runs where no body does.
    """
    if attention.get("v_head_size"):
        return LATENT_COPIES
    return SPARSE_COPIES if attention["topk"] else dense


def prefill_chunk(attention: dict[str, Any], copies: int) -> Callable[[int], int]:
    """A rule for Session: position to tokens a step.

    Args:
        attention: the manifest's ``attention``.
        copies: float32 tensors of shape (heads, tokens, cache rows) that are alive at once; 0 where the
            engine's attention is tiled and keeps none.
    """
    per_token_and_row = int(attention["num_heads"]) * 4 * copies

    def rule(position: int) -> int:
        if not per_token_and_row:
            return LONGEST
        tokens = BUDGET // (per_token_and_row * (position + LONGEST))
        return max(1, min(LONGEST, tokens if tokens < ALIGNMENT else tokens // ALIGNMENT * ALIGNMENT))

    return rule
