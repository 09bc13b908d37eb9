"""One sequence on an engine: its position, its cache, and prefill in bounded chunks.

The base classes own everything that does not depend on the engine: validation, chunking, the list of
tokens in the cache, and consistency after a failure. An engine implements five small hooks, and two more
for models with recurrent layers, whose states cannot drop tokens: going back loads a snapshot, and what lies
between it and the target is computed again before the next step.
"""

from __future__ import annotations

import abc
from collections.abc import Callable, Sequence
from types import TracebackType
from typing import Any, Literal, TypeAlias, TypeVar

import numpy as np
from numpy.typing import NDArray

from cpm_edge.runtimes.errors import BackendError, ContextError, PromptError
from cpm_edge.runtimes.snapshots import INTERVAL, Snapshots, States
from cpm_edge.runtimes.sparsity import MlpSparsity

Logits: TypeAlias = Literal["last", "all"]
FloatArray: TypeAlias = NDArray[np.float32]
TokenArray: TypeAlias = NDArray[np.int64]

_ENCODE = "model.encode(text) makes a list of token ids."


S = TypeVar("S", bound="Session")


class Session(abc.ABC):
    """A growing sequence of tokens and the caches that belong to it. Not safe for use by two threads at once.

    Args:
        max_context: the most tokens the cache holds.
        vocab_size: token ids are in [0, vocab_size).
        prefill_chunk: maps a cache position to the largest number of tokens one engine step may take there,
            so that the workspace of a step stays within its budget at any length.
        state_bytes: of the recurrent layers' states, 0 without any.
    """

    def __init__(
        self,
        *,
        max_context: int,
        vocab_size: int,
        prefill_chunk: Callable[[int], int],
        state_bytes: int = 0,
    ) -> None:
        self.max_context = max_context
        self.vocab_size = vocab_size
        self._prefill_chunk = prefill_chunk
        self._tokens: list[int] = []
        self._cached = 0  # of them, how many the engine's caches and states hold
        self._snapshots = Snapshots(state_bytes) if state_bytes else None
        self._closed = False

    @property
    def position(self) -> int:
        """Number of tokens in the cache."""
        return len(self._tokens)

    @property
    def pending(self) -> int:
        """Tokens before ``position`` that the next step computes again; 0 without recurrent layers."""
        return len(self._tokens) - self._cached

    @property
    def tokens(self) -> list[int]:
        """A copy of the token ids in the cache, oldest first."""
        return list(self._tokens)

    @property
    def closed(self) -> bool:
        """Whether the caches were given back, by close or after a failure that could not be undone."""
        return self._closed

    def forward(self, token_ids: Sequence[int] | NDArray[Any], logits: Logits = "last") -> FloatArray:
        """Append tokens and return next-token logits.

        A prompt longer than one engine step is fed in chunks. When a step fails or is interrupted, the chunks
        before it stay in the cache and ``position`` says how many tokens that is.

        Args:
            token_ids: (T,) integers in [0, vocab_size), T >= 1.
            logits: "last" for the last token's row only, "all" for a row per token.

        Returns:
            float32 (vocab_size,) for "last", (T, vocab_size) for "all".

        Raises:
            PromptError: token_ids is empty, not 1-D, not integer or out of range.
            ContextError: position + T > max_context; nothing was run.
            BackendError: the session is closed.
        """
        self._check_open()
        if logits not in ("last", "all"):
            raise ValueError(f"logits: expected 'last' or 'all', got {logits!r}")
        tokens = self._check_tokens(token_ids)
        self._catch_up()
        if len(tokens) > 1:
            self._keep_states()
        every_row = np.empty((len(tokens), self.vocab_size), np.float32) if logits == "all" else None
        done = 0
        while True:
            chunk = tokens[done : done + self._step_size()]
            rows = self._run(chunk, logits)
            if every_row is not None:
                every_row[done : done + len(chunk)] = rows
            done += len(chunk)
            if done == len(tokens):
                if done > 1:
                    self._keep_states()
                return every_row if every_row is not None else rows[-1]

    def rewind(self, n: int) -> None:
        """Drop the last ``n`` tokens from the cache.

        With recurrent layers the next step computes up to ``pending`` tokens again.

        Raises:
            ContextError: n is not in [0, position].
        """
        self._check_open()
        if not 0 <= n <= self.position:
            raise ContextError(f"rewind: expected 0 <= n <= {self.position} (the position), got {n}")
        target = self.position - n
        if self._snapshots is not None:
            self._snapshots.forget_after(target)
        if target < self._cached:
            self._go_back(target)
        del self._tokens[target:]

    def reset(self) -> None:
        """Empty the cache."""
        self.rewind(self.position)

    def fork(self) -> Session:
        """An independent session with the same cache contents."""
        self._check_open()
        twin = self._clone()
        twin._tokens, twin._cached = list(self._tokens), self._cached
        twin._snapshots = self._snapshots and self._snapshots.copy()
        return twin

    def close(self) -> None:
        """Give the caches back. Closing twice is harmless."""
        if not self._closed:
            self._closed = True
            self._close()

    def __enter__(self: S) -> S:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    @abc.abstractmethod
    def cache_bytes(self) -> int:
        """Bytes that this session's caches, states and snapshots occupy now."""

    def state_bytes(self) -> int:
        """How many of ``cache_bytes`` are the states of recurrent layers."""
        return self._snapshots.state_bytes if self._snapshots else 0

    def snapshot_bytes(self) -> int:
        """How many of ``cache_bytes`` are snapshots of states; forks share them."""
        return self._snapshots.nbytes if self._snapshots else 0

    def mlp_sparsity(self) -> MlpSparsity | None:
        """What tokens computed one by one left out of their MLPs so far, forks not included.

        None where all is read: engines without such kernels, models without a threshold on the gate.
        """
        return None

    def layer_keys(self, layer: int) -> FloatArray:
        """Keys of one layer as the cache holds them, float32 (kv heads, position - pending, head_dim): for
        checks."""
        raise NotImplementedError(f"{type(self).__name__} does not show its cache")

    def layer_state(self, layer: int) -> FloatArray:
        """State of one recurrent layer after position - pending tokens, float32 (heads, D, D): for checks."""
        raise NotImplementedError(f"{type(self).__name__} does not show its states")

    @abc.abstractmethod
    def _step(self, tokens: TokenArray, logits: Logits) -> FloatArray:
        """Append one chunk, int64 (T,), and return float32 (1, vocab) for "last" or (T, vocab) for "all".

        ``self._cached`` is the position of the chunk's first token. The result may be a view of a reused
        buffer only for "all"; a "last" row is handed to the caller as it is.
        """

    @abc.abstractmethod
    def _truncate(self, position: int) -> None:
        """Make the cache hold its first ``position`` tokens. Also undoes a step that failed midway."""

    @abc.abstractmethod
    def _clone(self) -> Session:
        """A session of the same kind with a copy of the cache contents."""

    def _close(self) -> None:  # noqa: B027 - a hook that an engine may leave out
        """Release engine resources."""

    def _save_states(self) -> States:
        """Copies of the recurrent layers' states."""
        raise NotImplementedError(f"{type(self).__name__} has no states")

    def _load_states(self, states: States | None) -> None:
        """Go on from copies that ``_save_states`` made, or from the beginning; they stay as they are."""
        raise NotImplementedError(f"{type(self).__name__} has no states")

    def _step_size(self) -> int:
        return max(1, self._prefill_chunk(self._cached))

    def _catch_up(self) -> None:
        """Compute again what lies between the snapshot that a rewind loaded and its target."""
        while self.pending:
            chunk = self._tokens[self._cached : self._cached + self._step_size()]
            self._run(np.array(chunk, np.int64), "last")

    def _keep_states(self) -> None:
        snapshots = self._snapshots
        if snapshots is not None and self._cached > snapshots.newest:
            snapshots.add(self._cached, self._save_states())

    def _go_back(self, position: int) -> None:
        """Let the engine hold ``position`` tokens, or as many as the nearest snapshot before."""
        if self._snapshots is not None:
            position, states = self._snapshots.at_most(position)
            self._load_states(states)
        self._truncate(position)
        self._cached = position

    def _run(self, chunk: TokenArray, logits: Logits) -> FloatArray:
        try:
            rows = self._step(chunk, logits)
            expected = (len(chunk) if logits == "all" else 1, self.vocab_size)
            if rows.shape != expected:
                raise BackendError(f"logits of the engine: expected shape {expected}, got {rows.shape}")
            if not self.pending:
                self._tokens.extend(chunk.tolist())
            self._cached += len(chunk)
        except BaseException:
            self._undo()
            raise
        if self._snapshots is not None and self._cached >= self._snapshots.newest + INTERVAL:
            self._keep_states()
        return rows

    def _undo(self) -> None:
        # The engine may have written part of the chunk. If it cannot go back, its cache is of no further use.
        try:
            self._go_back(self._cached)
        except BaseException:
            self.close()
            raise

    def _check_open(self) -> None:
        if self._closed:
            raise BackendError("this session is closed", hint="Open a new one with model.session().")

    def _check_tokens(self, token_ids: Sequence[int] | NDArray[Any]) -> TokenArray:
        tokens = np.asarray(token_ids)
        if tokens.size == 0:
            raise PromptError("token_ids: expected at least one token, got none", hint=_ENCODE)
        if tokens.ndim != 1 or tokens.dtype.kind not in "iu":
            raise PromptError(
                f"token_ids: expected 1-D integers, got shape {tokens.shape}, dtype {tokens.dtype}",
                hint=_ENCODE,
            )
        low = high = int(tokens[0])
        if tokens.size > 1:  # a decode step has no time for what a single token does not need
            low, high = int(tokens.min()), int(tokens.max())
        if low < 0 or high >= self.vocab_size:
            raise PromptError(
                f"token_ids: expected ids in [0, {self.vocab_size}), got {low if low < 0 else high}",
                hint="The tokens come from the tokenizer of another model.",
            )
        if self.position + len(tokens) > self.max_context:
            raise ContextError(
                f"{len(tokens)} tokens do not fit: {self.position} of {self.max_context} positions are taken",
                hint="Shorten the input, or export again with a larger --max-context.",
            )
        return tokens.astype(np.int64)


class Engine(abc.ABC):
    """A loaded model that sessions share. An engine module makes one in its ``open_engine``:

    ``open_engine(bundle: Bundle, *, device: str, threads: int | None, max_context: int | None) -> Engine``
    where max_context, when given, is at most the manifest's limit.
    """

    @abc.abstractmethod
    def session(self) -> Session:
        """A new, empty session."""

    @abc.abstractmethod
    def info(self) -> dict[str, Any]:
        """JSON-ready facts for reports: at least engine, version, device, threads and max_context."""

    def close(self) -> None:  # noqa: B027 - a hook that an engine may leave out
        """Release the model. Sessions made from it must not be used afterwards."""
