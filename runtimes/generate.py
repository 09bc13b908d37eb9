"""The generation loop: prompt tokens in, pieces of text out, and a finish reason whatever happens."""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Literal, TypeAlias

from cpm_edge.runtimes.detokenize import StopMatcher, StreamDecoder
from cpm_edge.runtimes.errors import ContextError, PromptError
from cpm_edge.runtimes.options import GenerationOptions
from cpm_edge.runtimes.sampling import Sampler
from cpm_edge.runtimes.session import FloatArray, Session
from cpm_edge.runtimes.sparsity import MlpSparsity
from cpm_edge.runtimes.stats import Clock, Stats, peak_rss
from cpm_edge.runtimes.thinking import Event, ThoughtSplitter, split_thought
from cpm_edge.runtimes.tokenizer import Tokenizer

FinishReason: TypeAlias = Literal["eos", "stop", "length", "context", "interrupted"]


@dataclass(frozen=True)
class Result:
    """A finished generation.

    Attributes:
        text: everything that was generated, without the stop string that ended it.
        thought: the part before the answer, "" when there is none; see ``runtimes.thinking``.
        answer: the rest; equal to ``text`` when there is no thought, "" when it was never closed.
        finish_reason: "eos" (an end-of-sequence token), "stop" (a stop string), "length" (max_new_tokens),
            "context" (the cache is full) or "interrupted" (Ctrl-C, or the stream was closed).
        token_ids: every token produced, a final end-of-sequence token included.
        stats: what it cost.
    """

    text: str
    finish_reason: FinishReason
    token_ids: list[int]
    stats: Stats = field(repr=False)
    thought: str = ""
    answer: str = ""


def check_prompt(prompt_ids: Sequence[int], max_context: int) -> None:
    """Refuse a prompt that cannot be run, before anything is.

    Raises:
        PromptError: there are no tokens. ContextError: there are more than the context holds.
    """
    if not prompt_ids:
        raise PromptError("the prompt is empty", hint="Give at least one character of text.")
    if len(prompt_ids) > max_context:
        raise ContextError(
            f"the prompt has {len(prompt_ids)} tokens; the context holds {max_context}",
            hint="Shorten it, or export the bundle again with a larger --max-context.",
        )


class Stream(Iterator[str]):
    """Pieces of text as they are generated, or ``events``; ``result`` when it has ended.

    Ctrl-C while the model computes ends the stream like any other finish reason.

    Args:
        session: may hold tokens already; what it shares with the prompt is not computed again.
        in_thought: the prompt ends inside a thought.
        release: called once with the session when the stream ends, in any way.
    """

    def __init__(
        self,
        session: Session,
        tokenizer: Tokenizer,
        prompt_ids: Sequence[int],
        options: GenerationOptions,
        *,
        in_thought: bool = False,
        load_seconds: float = 0.0,
        release: Callable[[Session], None] = Session.close,
    ) -> None:
        self.in_thought = in_thought
        self._session = session
        self._prompt_ids = list(prompt_ids)
        self._options = options
        self._decoder = StreamDecoder(tokenizer.backend, special=options.special)
        self._matcher = StopMatcher(options.stop)
        self._eos_ids = frozenset() if options.ignore_eos else tokenizer.eos_ids
        # A stop string that is one added token never shows up in text without special tokens.
        self._stop_ids = {id_ for stop in options.stop if (id_ := tokenizer.added_id(stop)) is not None}
        self._sampler = Sampler(options)
        self._stats = Stats(load_seconds=load_seconds, prompt_tokens=len(self._prompt_ids))
        self._sparsity: MlpSparsity | None = None  # before the first decode step
        self._token_ids: list[int] = []
        self._text: list[str] = []
        self._reason: FinishReason | None = None
        self._release = release
        self._pieces = self._run()

    def __next__(self) -> str:
        return next(self._pieces)

    def events(self) -> Iterator[Event]:
        """Instead of the pieces: the same text told apart into thought and answer, without the tags.

        Together they are ``result.thought`` and ``result.answer``.
        """
        splitter = ThoughtSplitter(in_thought=self.in_thought)
        for piece in self:
            yield from splitter.push(piece)
        yield from splitter.flush()

    def close(self) -> None:
        """End the generation early; the result then says "interrupted"."""
        self._pieces.close()
        self._finish()  # a generator that never started has no clean-up to run

    @property
    def result(self) -> Result:
        """The whole generation.

        Raises:
            RuntimeError: the stream has not ended.
        """
        if self._reason is None:
            raise RuntimeError("the stream has not ended: iterate over it, or close it, first")
        text = "".join(self._text)
        thought, answer = split_thought(text, in_thought=self.in_thought)
        return Result(text, self._reason, list(self._token_ids), self._stats, thought, answer)

    def _run(self) -> Generator[str, None, None]:
        reason: FinishReason = "interrupted"
        try:
            clock = Clock()
            logits = self._prefill()
            while True:
                token = self._pick(logits, clock)
                piece, ended = self._accept(token)
                if piece:
                    self._text.append(piece)
                    yield piece
                if ended:
                    reason = ended
                    break
                clock = Clock()
                logits = self._session.forward([token])
        except KeyboardInterrupt:
            pass
        finally:
            self._reason = reason
            self._finish()
        if rest := self._rest():
            self._text.append(rest)
            yield rest

    def _prefill(self) -> FloatArray:
        cached = self._session.tokens
        # The last token is always run: its logits are needed.
        common = _common_prefix(cached, self._prompt_ids[:-1])
        self._session.rewind(len(cached) - common)
        self._stats.cached_tokens = common - self._session.pending
        self._sampler.observe(self._prompt_ids)
        clock = Clock()
        logits = self._session.forward(self._prompt_ids[common:])
        self._stats.prefill_seconds = clock.seconds()
        self._sparsity = self._session.mlp_sparsity()
        return logits

    def _pick(self, logits: FloatArray, clock: Clock) -> int:
        token = self._sampler.pick(logits)
        self._token_ids.append(token)
        self._stats.new_tokens += 1
        if self._stats.new_tokens == 1:
            self._stats.ttft_seconds = clock.seconds()
        else:
            self._stats.decode_seconds += clock.seconds()
        return token

    def _accept(self, token: int) -> tuple[str, FinishReason | None]:
        """The text to show after this token, and why it is the last one, if it is."""
        ended: FinishReason | None = None
        if token in self._eos_ids:
            ended = "eos"
        elif token in self._stop_ids:
            return "", "stop"
        if ended and not self._options.special:
            return "", ended
        piece = self._matcher.push(self._decoder.push(token))
        if self._matcher.stopped:
            return piece, "stop"
        if ended is None and len(self._token_ids) == self._options.max_new_tokens:
            ended = "length"
        if ended is None and self._session.position >= self._session.max_context:
            ended = "context"
        return piece, ended

    def _rest(self) -> str:
        if self._matcher.stopped:
            return ""
        text = self._matcher.push(self._decoder.flush())
        if self._matcher.stopped:
            self._reason = "stop"
            return text
        return text + self._matcher.flush()

    def _finish(self) -> None:
        release, self._release = self._release, _keep
        if release is _keep:
            return
        self._reason = self._reason or "interrupted"
        self._stats.peak_rss_bytes = peak_rss()
        if not self._session.closed and (sparsity := self._session.mlp_sparsity()) is not None:
            self._stats.mlp_sparsity = sparsity.since(self._sparsity)
        release(self._session)


def _keep(session: Session) -> None:
    """Stands for a session that was released already."""


def _common_prefix(a: Sequence[int], b: Sequence[int]) -> int:
    for index, (x, y) in enumerate(zip(a, b, strict=False)):
        if x != y:
            return index
    return min(len(a), len(b))
