"""The interactive chat of cpm-run."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any

import click

from cpm_edge.runtimes.console import print_error
from cpm_edge.runtimes.errors import CpmEdgeError
from cpm_edge.runtimes.generate import Result
from cpm_edge.runtimes.model import Model
from cpm_edge.runtimes.printer import show

HELP = """\
/help      show this list
/reset     forget the conversation
/think     let the model think before it answers, from here on
/no_think  let it answer at once
/stats     show what the last answer cost
/exit      leave (or Ctrl-D)
Ctrl-C stops an answer; at the prompt it leaves."""


class Repl:
    """Reads a line, streams an answer, keeps the conversation.

    Args:
        system: a system message that stays in front.
        options: options of Model.chat, enable_thinking among them.
        read: asks for a line; raises EOFError at the end of input.
        show_stats: prints the statistics of a result.
        always_stats: show them after every answer.
        hide_thought: print answers only.
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
        hide_thought: bool = False,
    ) -> None:
        self._model = model
        self._start = [{"role": "system", "content": system}] if system else []
        self._messages: list[dict[str, str]] = list(self._start)
        self._options = dict(options)
        self._read = read
        self._show_stats = show_stats
        self._always_stats = always_stats
        self._hide_thought = hide_thought
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
            if line in _COMMANDS:
                _COMMANDS[line](self)
            elif line:
                self._answer(line)

    def _answer(self, line: str) -> None:
        self._messages.append({"role": "user", "content": line})
        try:
            stream = self._model.chat(self._messages, stream=True, **self._options)
            show(stream, hide_thought=self._hide_thought)
        except CpmEdgeError as error:
            # The turn is dropped, so that the conversation can go on, say after a prompt that was too long.
            self._messages.pop()
            print_error(error)
            return
        self._last = result = stream.result
        if note := NOTES.get(result.finish_reason):
            click.echo(f"[{note}]", err=True)
        self._remember(result)
        if self._always_stats:
            self._show_stats(result)

    def _remember(self, result: Result) -> None:
        """Add the answer to the conversation; a question without one is forgotten."""
        if not result.answer:
            self._messages.pop()
            return
        turn = {"role": "assistant", "content": result.answer}
        # The key under which templates that keep thoughts look for them.
        self._messages.append({**turn, "reasoning_content": result.thought} if result.thought else turn)

    def _think(self, enabled: bool) -> None:
        if self._model.template is None or not self._model.template.has_thinking_switch:
            click.echo(NO_SWITCH, err=True)
            return
        self._options["enable_thinking"] = enabled
        click.echo(f"Thinking is {'on' if enabled else 'off'} from here on.", err=True)

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


# Only whole lines: MiniCPM reads /think and /no_think in a question too, for that question alone.
_COMMANDS: dict[str, Callable[[Repl], None]] = {
    "/help": Repl._help,
    "/reset": Repl._reset,
    "/stats": Repl._stats,
    "/think": lambda repl: repl._think(True),
    "/no_think": lambda repl: repl._think(False),
}

NO_SWITCH = "note: this model's chat template has no thinking switch"

NOTES = {
    "interrupted": "interrupted",
    "context": "the context is full; /reset starts anew",
    "length": "cut at --max-new-tokens",
}


def line_reader() -> Callable[[str], str]:
    """input(), with line editing and history where the platform has readline."""
    with contextlib.suppress(ImportError):
        import readline  # noqa: F401 - importing it is what switches it on
    return input
