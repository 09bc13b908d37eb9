"""A bundle ready to answer: its tokenizer, its chat template, its defaults and its engine."""

from __future__ import annotations

from collections.abc import Sequence
from types import TracebackType
from typing import Any, Literal, overload

from cpm_edge.runtimes.bundle import Bundle
from cpm_edge.runtimes.chat import ChatTemplate, Message
from cpm_edge.runtimes.errors import BackendError, PromptError
from cpm_edge.runtimes.generate import Result, Stream, check_prompt
from cpm_edge.runtimes.options import GenerationOptions
from cpm_edge.runtimes.session import Engine, Session
from cpm_edge.runtimes.thinking import opens_thought
from cpm_edge.runtimes.tokenizer import Tokenizer


class Model:
    """Made by ``cpm_edge.runtimes.load``. Keyword options of the methods are those of GenerationOptions.

    Attributes:
        tokenizer: encodes prompts, decodes answers, knows BOS and every end-of-sequence id.
        template: the chat template, or None if the bundle has none.
        defaults: options of generation_config.json, which keyword options change.
        max_context: tokens that prompt and answer may have together.
    """

    def __init__(
        self,
        engine: Engine,
        tokenizer: Tokenizer,
        *,
        template: ChatTemplate | None = None,
        defaults: GenerationOptions | None = None,
        max_context: int,
        load_seconds: float = 0.0,
    ) -> None:
        self.engine = engine
        self.tokenizer = tokenizer
        self.template = template
        self.defaults = defaults or GenerationOptions()
        self.max_context = max_context
        self.load_seconds = load_seconds
        self._chat_session: Session | None = None
        self._closed = False

    @classmethod
    def from_bundle(
        cls, bundle: Bundle, engine: Engine, *, max_context: int | None = None, load_seconds: float = 0.0
    ) -> Model:
        """Read what lies beside the engine's files.

        Raises:
            BundleError: no tokenizer, or a file that is malformed.
        """
        tokenizer = Tokenizer.from_bundle(bundle)
        return cls(
            engine,
            tokenizer,
            template=ChatTemplate.from_bundle(bundle, tokenizer.special_tokens),
            defaults=GenerationOptions.from_generation_config(bundle.read_json("generation_config.json")),
            max_context=max_context or bundle.manifest.context.max_context,
            load_seconds=load_seconds,
        )

    def session(self) -> Session:
        """A new, empty sequence for work on logits; close it when done."""
        if self._closed:
            raise BackendError("this model is closed", hint="Open the bundle again with load().")
        return self.engine.session()

    def stream(self, prompt: str, **options: Any) -> Stream:
        """Continue a text as it stands, without the chat template, piece by piece.

        Raises:
            PromptError: the prompt is empty. ContextError: it is longer than the context. Both come from the
            call itself, not from the first piece.
        """
        if not prompt:
            raise PromptError("the prompt is empty", hint="Give at least one character of text.")
        return self._start(prompt, options, keep_session=False)

    def generate(self, prompt: str, **options: Any) -> Result:
        """Like stream, but returns the whole answer."""
        return _drain(self.stream(prompt, **options))

    @overload
    def chat(
        self,
        messages: Sequence[Message],
        *,
        tools: Sequence[Any] | None = ...,
        enable_thinking: bool | None = ...,
        stream: Literal[False] = ...,
        **options: Any,
    ) -> Result: ...
    @overload
    def chat(
        self,
        messages: Sequence[Message],
        *,
        tools: Sequence[Any] | None = ...,
        enable_thinking: bool | None = ...,
        stream: Literal[True],
        **options: Any,
    ) -> Stream: ...
    def chat(
        self,
        messages: Sequence[Message],
        *,
        tools: Sequence[Any] | None = None,
        enable_thinking: bool | None = None,
        stream: bool = False,
        **options: Any,
    ) -> Result | Stream:
        """Answer the last message of a conversation.

        The cache of the last conversation is kept: the turns that both share are not computed again.

        Args:
            messages: {"role": "system" | "user" | "assistant" | "tool", "content": text}, oldest first.
            tools: JSON schemas of functions that the model may call.
            enable_thinking: True or False for templates with that switch, None for their default.
            stream: return the pieces as they come; ``events()`` of the stream tells the thought of a thinking
                model from its answer.

        Raises:
            PromptError: no template, or it cannot render the messages. ContextError: too long.
        """
        text = self.render(messages, tools=tools, enable_thinking=enable_thinking)
        answer = self._start(text, options, keep_session=True)
        return answer if stream else _drain(answer)

    def render(
        self,
        messages: Sequence[Message],
        *,
        tools: Sequence[Any] | None = None,
        enable_thinking: bool | None = None,
    ) -> str:
        """The prompt text that ``chat`` would run."""
        if self.template is None:
            raise PromptError(
                "this bundle has no chat template",
                hint="Use cpm-run --raw, or model.generate(), for plain text.",
            )
        return self.template.render(messages, tools=tools, enable_thinking=enable_thinking)

    def encode(self, text: str) -> list[int]:
        """Token ids of a prompt, BOS included once if the model wants it."""
        return self.tokenizer.encode(text)

    def decode(self, token_ids: Sequence[int], *, special: bool = False) -> str:
        """Text of token ids."""
        return self.tokenizer.decode(token_ids, special=special)

    def count_tokens(self, prompt: str | Sequence[Message]) -> int:
        """Tokens that a text, or a conversation after rendering, takes of the context."""
        return len(self.encode(prompt if isinstance(prompt, str) else self.render(prompt)))

    def info(self) -> dict[str, Any]:
        """JSON-ready facts about the engine; see Engine.info."""
        return self.engine.info()

    def close(self) -> None:
        """Release the engine and every cache."""
        if not self._closed:
            self._closed = True
            self.forget()
            self.engine.close()

    def forget(self) -> None:
        """Release the cache that ``chat`` keeps."""
        if self._chat_session is not None:
            self._chat_session.close()
            self._chat_session = None

    def __enter__(self) -> Model:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _start(self, prompt: str, changes: dict[str, Any], *, keep_session: bool) -> Stream:
        prompt_ids = self.encode(prompt)
        options = self.defaults.replace(**changes)
        check_prompt(prompt_ids, self.max_context)
        # A stream that is still running has taken the kept session out, so a second one gets its own.
        session = self._chat_session if keep_session else None
        if session is None:
            session = self.session()
        else:
            self._chat_session = None
        return Stream(
            session,
            self.tokenizer,
            prompt_ids,
            options,
            in_thought=opens_thought(prompt),
            load_seconds=self.load_seconds,
            release=self._take_back if keep_session else Session.close,
        )

    def _take_back(self, session: Session) -> None:
        if self._closed or self._chat_session is not None or session.closed:
            session.close()
        else:
            self._chat_session = session


def _drain(stream: Stream) -> Result:
    for _ in stream:
        pass
    return stream.result
