"""Picking the next token from logits.

The order is that of Hugging Face generate: repetition penalty, temperature, top-k, top-p, min-p, and each
step sees what the one before left. (llama.cpp divides by the temperature last, so there top-p and min-p see
other probabilities.) Equally likely tokens rank by id, lowest first.
"""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
from numpy.typing import NDArray

from cpm_edge.runtimes.errors import BackendError
from cpm_edge.runtimes.options import GenerationOptions
from cpm_edge.runtimes.session import FloatArray

# Tokens ranked at first for top-p; nearly always enough, and far cheaper than sorting 130,000.
_FIRST_RANKED = 256


class Sampler:
    """Draws tokens; the same options, seed and logits give the same tokens.

    Args:
        options: see GenerationOptions; ``options.seed`` starts a PCG64 generator.
    """

    def __init__(self, options: GenerationOptions) -> None:
        self._options = options
        self._random = np.random.Generator(np.random.PCG64(options.seed))
        self._seen: set[int] = set()

    def observe(self, token_ids: Iterable[int]) -> None:
        """Tell the repetition penalty about tokens of the prompt. Picked tokens are counted by themselves."""
        if self._options.repetition_penalty != 1:
            self._seen.update(token_ids)

    def pick(self, logits: FloatArray) -> int:
        """The next token.

        Args:
            logits: float32 (vocab,); left unchanged. -inf excludes a token.

        Raises:
            BackendError: a logit is NaN or +inf, or all are -inf.
        """
        scores = self._penalized(logits.astype(np.float64))
        highest = float(scores.max())  # NaN if any is NaN
        if not np.isfinite(highest):
            raise BackendError(
                f"the engine returned unusable logits (the highest is {highest})",
                hint="Check the files with: cpm-run BUNDLE --check; if they are whole, export with --verify.",
            )
        token = int(scores.argmax()) if self._options.temperature == 0 else self._draw(scores - highest)
        self.observe((token,))
        return token

    def _penalized(self, scores: NDArray[np.float64]) -> NDArray[np.float64]:
        if self._seen:
            seen = np.fromiter(self._seen, np.int64, len(self._seen))
            old, penalty = scores[seen], self._options.repetition_penalty
            scores[seen] = np.where(old < 0, old * penalty, old / penalty)
        return scores

    def _draw(self, scores: NDArray[np.float64]) -> int:
        options = self._options
        scores /= options.temperature
        ids = _top_k(scores, options.top_k)
        if options.top_p < 1:
            ids = _top_p(scores, ids, options.top_p)
        if options.min_p > 0:
            ids = ids[scores[ids] >= scores[ids].max() + np.log(options.min_p)]
        mass = np.cumsum(np.exp(scores[ids]))
        return int(ids[np.searchsorted(mass, self._random.random() * mass[-1], side="right")])


def _top_k(scores: NDArray[np.float64], k: int) -> NDArray[np.intp]:
    """Ids of the k highest scores, and of those that tie with the k-th."""
    if not 0 < k < len(scores):
        return np.flatnonzero(scores > -np.inf)
    threshold = np.partition(scores, len(scores) - k)[len(scores) - k]
    return np.flatnonzero((scores >= threshold) & (scores > -np.inf))


def _top_p(scores: NDArray[np.float64], ids: NDArray[np.intp], p: float) -> NDArray[np.intp]:
    """The shortest ranking of ``ids`` whose probabilities sum to p or more, most likely first."""
    values = scores[ids]
    total = np.exp(values).sum()
    count = _FIRST_RANKED
    while True:
        inside = _top_k(values, count)
        ranked = inside[np.argsort(-values[inside], kind="stable")]
        before = np.concatenate(([0.0], np.cumsum(np.exp(values[ranked])) / total))
        keep = int(np.searchsorted(before, p, side="left"))  # token i stays if what precedes it is below p
        if keep <= len(ranked) or len(ranked) == len(ids):
            return ids[ranked[:keep]]
        count *= 8
