"""Option types and options that several subcommands share."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import click

from cpm_edge.benchmarks.shape import shape_names

Function = TypeVar("Function", bound=Callable[..., Any])
PATH = click.Path(path_type=Path)


def int_list(text: str) -> tuple[int, ...]:
    """An option's type: whole numbers from 1 on, separated by commas, each once.

    Raises:
        click.BadParameter: anything else.
    """
    try:
        numbers = tuple(int(part) for part in text.split(","))
    except ValueError:
        numbers = ()
    if not numbers or min(numbers) < 1:
        raise click.BadParameter(f"expected numbers from 1 on, separated by commas, got {text!r}")
    return tuple(dict.fromkeys(numbers))


def _together(*options: Callable[[Function], Function]) -> Callable[[Function], Function]:
    def decorate(function: Function) -> Function:
        for option in reversed(options):
            function = option(function)
        return function

    return decorate


shape_options = _together(
    click.option(
        "--shape",
        default="minicpm4-0.5b",
        metavar="NAME|FILE.json",
        help=f"A model's shape: {', '.join(shape_names())}, or a config.json.",
    ),
    click.option("--layers", type=click.IntRange(min=1), help="Fewer decoder layers than the model has."),
)
cache_option = click.option(
    "--bundle-cache", "cache", type=PATH, help="Keep random checkpoints, bundles and GGUF files here."
)
threads_option = click.option(
    "--threads", default=2, type=click.IntRange(min=1), help="CPU threads that every engine uses."
)
repeat_option = click.option("--repeat", default=5, type=click.IntRange(min=1), help="Rounds of the run.")
json_option = click.option(
    "--json", "json_file", type=PATH, help="Write every raw number, the machine and the versions here."
)
SETTINGS = {"max_content_width": 100, "show_default": True}
