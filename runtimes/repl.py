"""The interactive chat of cpm-run."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any

import click

from cpm_edge.runtimes.console import print_error
from cpm_edge.runtimes.errors import CpmEdgeError
from cpm_edge.runtimes.generate import Result, Stream
from cpm_edge.runtimes.model import Model

HELP = """\
/help   show this list
/reset  forget the conversation
/stats  show what the last answer cost
/exit   leave (or Ctrl-D)
Ctrl-C stops an answer; at the prompt it leaves."""


class Repl:
    """Reads a line, streams an answer, keeps the conversation.

    Args:
        system: a system message that stays in front.
        options: options of Model.chat, enable_thinking among them.
        read: asks for a line; raises EOFError at the end of input.
        show_stats: prints the statistics of a result.
        always_stats: show them after every answer.
    """

    def __init__(
        self,
        model: Model,
        *,
        system: str | None,
        options: dict[str, Any],
        read: Callable[[str], str],
        show_stats: Callable[[Result], None],
        always_stats: bool = False,
    ) -> None:
        self._model = model
        self._start = [{"role": "system", "content": system}] if system else []
        self._messages: list[dict[str, str]] = list(self._start)
        self._options = options
        self._read = read
        self._show_stats = show_stats
        self._always_stats = always_stats
        self._last: Result | None = None

    def run(self) -> None:
        """Until /exit, end of input, or Ctrl-C at the prompt."""
        while True:
            try:
                line = self._read("> ").strip()
            except (EOFError, KeyboardInterrupt):
                click.echo()
                return
            if line in ("/exit", "/quit"):
                return
            if line.startswith("/") and line.split()[0] in _COMMANDS:
                _COMMANDS[line.split()[0]](self)
            elif line:
                self._answer(line)

    def _answer(self, line: str) -> None:
        self._messages.append({"role": "user", "content": line})
        try:
            stream = self._model.chat(self._messages, stream=True, **self._options)
            show(stream)
        except CpmEdgeError as error:
            # The turn is dropped, so that the conversation can go on, say after a prompt that was too long.
            self._messages.pop()
            print_error(error)
            return
        self._last = result = stream.result
        if note := NOTES.get(result.finish_reason):
            click.echo(f"[{note}]", err=True)
        if result.text:
            self._messages.append({"role": "assistant", "content": result.text})
        else:
            self._messages.pop()
        if self._always_stats:
            self._show_stats(result)

    def _help(self) -> None:
        click.echo(HELP)

    def _reset(self) -> None:
        self._messages = list(self._start)
        self._last = None
        click.echo("The conversation is forgotten.", err=True)

    def _stats(self) -> None:
        if self._last is None:
            click.echo("There is no answer yet.", err=True)
        else:
            self._show_stats(self._last)


# A line such as "/think about it" is a question: MiniCPM reads /think and /no_think in messages.
_COMMANDS: dict[str, Callable[[Repl], None]] = {
    "/help": Repl._help,
    "/reset": Repl._reset,
    "/stats": Repl._stats,
}

NOTES = {
    "interrupted": "interrupted",
    "context": "the context is full; /reset starts anew",
    "length": "cut at --max-new-tokens",
}


def show(stream: Stream) -> None:
    """Print the pieces as they come; Ctrl-C ends the stream also while a piece is being printed."""
    try:
        for piece in stream:
            click.echo(piece, nl=False)
    except KeyboardInterrupt:
        stream.close()
    click.echo()


def line_reader() -> Callable[[str], str]:
    """input(), with line editing and history where the platform has readline."""
    with contextlib.suppress(ImportError):
        import readline  # noqa: F401 - importing it is what switches it on
    return input
