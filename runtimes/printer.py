"""Printing an answer while it is made, with the thought of a thinking model set apart."""

from __future__ import annotations

import sys

import click

from cpm_edge.runtimes.generate import Stream
from cpm_edge.runtimes.thinking import OPEN, Event


def show(stream: Stream, *, hide_thought: bool = False) -> None:
    """Print a stream on stdout, ended by a newline.

    On a terminal a thought is dimmed and its tags are left out; elsewhere the text stands as it was
    generated, so that a program can tell the two apart. Ctrl-C ends the stream also while a piece is printed.

    Args:
        hide_thought: print the answer alone.
    """
    try:
        if hide_thought or sys.stdout.isatty():
            _show_events(stream, hide_thought)
        else:
            _show_text(stream)
    except KeyboardInterrupt:
        stream.close()
    click.echo()
    if stream.result.text and not stream.result.answer:
        click.echo("[the answer ended within its thought]", err=True)


def _show_text(stream: Stream) -> None:
    # A tag that the template put at the end of the prompt belongs to the thought that follows.
    begin = f"{OPEN}\n" if stream.in_thought else ""
    for piece in stream:
        click.echo(begin + piece, nl=False)
        begin = ""


def _show_events(stream: Stream, hide_thought: bool) -> None:
    last: Event | None = None
    for event in stream.events():
        if event.kind == "thought" and hide_thought:
            continue
        if last is not None and last.kind != event.kind:
            click.echo("\n")
        click.echo(click.style(event.text, dim=True) if event.kind == "thought" else event.text, nl=False)
        last = event
