"""How a command line that exports tells what the user should know: ``warning:`` lines on stderr."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Iterator

import click

from cpm_edge.exporter.errors import ExportWarning


@contextlib.contextmanager
def warnings_printed() -> Iterator[list[str]]:
    """Print each ExportWarning once, when the exports have ended in whatever way.

    Yields:
        the list that their texts are in then.
    """
    messages: list[str] = []
    with warnings.catch_warnings(record=True) as notes:
        warnings.simplefilter("always", ExportWarning)
        try:
            yield messages
        finally:
            texts = [str(note.message) for note in notes if issubclass(note.category, ExportWarning)]
            messages += dict.fromkeys(texts)
            for message in messages:
                click.echo(f"warning: {message}", err=True)
