"""Chat templates, rendered as untrusted programs: in jinja2's immutable sandbox, with nothing to call.

Names, filters and whitespace rules are those of Hugging Face's apply_chat_template, since that is what the
templates were written for.
"""

from __future__ import annotations

import datetime
import json
from collections.abc import Mapping, Sequence
from typing import Any, NoReturn

import jinja2
import jinja2.ext
import jinja2.nodes
import jinja2.parser
import jinja2.sandbox
from jinja2.exceptions import SecurityError

from cpm_edge.runtimes.bundle import Bundle
from cpm_edge.runtimes.errors import BundleError, PromptError

Message = Mapping[str, Any]

# What a template can raise besides jinja2's own errors: ordinary operators on values of the wrong type.
_RENDER_ERRORS = (jinja2.TemplateError, TypeError, ValueError, LookupError, AttributeError, ArithmeticError)


class ChatTemplate:
    """Turns a conversation into the text of a prompt.

    Args:
        sources: template text by name; "default" is used, or "tool_use" when there are tools.
        special_tokens: bos_token and the like, which templates may print.

    A template with a syntax error fails when it is rendered: the model still continues plain text.
    """

    def __init__(self, sources: Mapping[str, str], special_tokens: Mapping[str, str]) -> None:
        self._sources = dict(sources)
        self._special_tokens = dict(special_tokens)
        self._error: str | None = None
        environment = _Sandbox(
            trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols", _GenerationTag]
        )
        environment.filters["tojson"] = _tojson
        environment.globals.update(raise_exception=_raise_exception, strftime_now=_strftime_now)
        try:
            self._templates = {name: environment.from_string(text) for name, text in sources.items()}
        except (jinja2.TemplateError, RecursionError) as error:
            self._error = _describe(error)

    @classmethod
    def from_bundle(cls, bundle: Bundle, special_tokens: Mapping[str, str]) -> ChatTemplate | None:
        """The template of chat_template.jinja, else of tokenizer_config.json, else None."""
        if path := bundle.optional("chat_template.jinja"):
            try:
                return cls({"default": path.read_text(encoding="utf-8")}, special_tokens)
            except UnicodeDecodeError as error:
                raise BundleError(f"chat_template.jinja: expected UTF-8 text: {error}") from error
        value = bundle.read_json("tokenizer_config.json").get("chat_template")
        if value is None:
            return None
        if isinstance(value, str):
            return cls({"default": value}, special_tokens)
        try:
            return cls({str(item["name"]): str(item["template"]) for item in value}, special_tokens)
        except (TypeError, KeyError) as error:
            raise BundleError(
                "tokenizer_config.json: chat_template: expected a string or a list of {name, template}"
            ) from error

    @property
    def has_thinking_switch(self) -> bool:
        """Whether enable_thinking makes a difference."""
        return any("enable_thinking" in text for text in self._sources.values())

    def render(
        self,
        messages: Sequence[Message],
        *,
        tools: Sequence[Any] | None = None,
        enable_thinking: bool | None = None,
    ) -> str:
        """The prompt text, ending where the assistant's answer begins.

        Args:
            messages: {"role": ..., "content": ...} mappings, oldest first.
            tools: JSON schemas of functions the model may call.
            enable_thinking: passed on only when it is not None: templates test whether it is defined.

        Raises:
            PromptError: no messages, a malformed one, or the template failed or did something unsafe.
        """
        _check_messages(messages)
        if self._error is not None:
            raise PromptError(f"the chat template has an error: {self._error}", hint=_RAW)
        name = "tool_use" if tools and "tool_use" in self._templates else "default"
        template = self._templates.get(name)
        if template is None:
            raise PromptError(
                f"no chat template named 'default', got {', '.join(sorted(self._templates))}", hint=_RAW
            )
        switches = {} if enable_thinking is None else {"enable_thinking": enable_thinking}
        values = {**self._special_tokens, **switches, "messages": messages, "tools": tools or None}
        try:
            return template.render(**values, documents=None, add_generation_prompt=True)
        except SecurityError as error:
            raise PromptError(
                f"the chat template tried something unsafe and was stopped: {error}",
                hint="Do not trust this bundle's template; " + _RAW[0].lower() + _RAW[1:],
            ) from error
        except (*_RENDER_ERRORS, RecursionError) as error:
            raise PromptError(f"the chat template failed: {_describe(error)}", hint=_RAW) from error


_RAW = "Give a prompt without the template: cpm-run --raw, or model.generate()."


class _Sandbox(jinja2.sandbox.ImmutableSandboxedEnvironment):
    def unsafe_undefined(self, obj: Any, attribute: str) -> NoReturn:
        # jinja2 would hand out an undefined value, which prints as nothing: an attack should be seen.
        raise SecurityError(f"access to {attribute!r} of a {type(obj).__name__}")


class _GenerationTag(jinja2.ext.Extension):
    """{% generation %} marks what the assistant says, for training; here its body is simply rendered."""

    tags = {"generation"}  # noqa: RUF012 - declared so by jinja2

    def parse(self, parser: jinja2.parser.Parser) -> list[jinja2.nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


def _check_messages(messages: Sequence[Message]) -> None:
    if not messages:
        raise PromptError(
            "messages: expected at least one, got none", hint='Pass [{"role": "user", "content": "..."}].'
        )
    for index, message in enumerate(messages):
        if not isinstance(message, Mapping) or not isinstance(message.get("role"), str):
            raise PromptError(
                f"messages[{index}]: expected {{'role': ..., 'content': ...}}, got {message!r}",
                hint="Roles are system, user, assistant and tool.",
            )


def _describe(error: BaseException) -> str:
    line = f" (line {error.lineno})" if isinstance(error, jinja2.TemplateSyntaxError) else ""
    return f"{error}{line}" if isinstance(error, jinja2.TemplateError) else f"{type(error).__name__}: {error}"


def _tojson(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    # jinja2's own filter escapes <, > and & for HTML, which models were not trained on.
    return json.dumps(
        value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys
    )


def _raise_exception(message: str) -> NoReturn:
    raise jinja2.TemplateError(message)


def _strftime_now(layout: str) -> str:
    return datetime.datetime.now().strftime(layout)
