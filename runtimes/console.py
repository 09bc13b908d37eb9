"""How a command line reports failures: ``error:`` and ``hint:`` on stderr, exit status 1."""

from __future__ import annotations

import functools
import os
import sys
from collections.abc import Callable
from typing import ParamSpec, TypeVar

import click

from cpm_edge.runtimes.errors import CpmEdgeError

P = ParamSpec("P")
R = TypeVar("R")


def print_error(error: CpmEdgeError) -> None:
    """Print an error and its hint on stderr."""
    click.echo(f"error: {error.message}", err=True)
    if error.hint:
        click.echo(f"hint: {error.hint}", err=True)


def report_errors(command: Callable[P, R]) -> Callable[P, R]:
    """Decorate the function under a click command.

    A CpmEdgeError is printed and ends the program with status 1, and so does Ctrl-C or an OSError that nobody
    expected: a path too long, a file that may not be read, an output on a full disk. A reader that closed the
    pipe ends it quietly with 0. Anything else is a defect and keeps its traceback.
    """

    @functools.wraps(command)
    def wrapped(*args: P.args, **kwargs: P.kwargs) -> R:
        try:
            return command(*args, **kwargs)
        except CpmEdgeError as error:
            print_error(error)
            sys.exit(1)
        except KeyboardInterrupt:
            print_error(CpmEdgeError("interrupted", hint="run the command again"))
            sys.exit(1)
        except BrokenPipeError:
            # Python flushes stdout at exit and would complain once more.
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            sys.exit(0)
        except OSError as error:
            print_error(_environment_error(error))
            sys.exit(1)

    return wrapped


def _environment_error(error: OSError) -> CpmEdgeError:
    where = f": {error.filename}" if error.filename else ""
    return CpmEdgeError(
        f"{error.strerror or error}{where}", hint="check the path, its permissions and the free space"
    )
