from __future__ import annotations

import click
import pytest

from cpm_edge.benchmarks.cli import main
from cpm_edge.benchmarks.commands.options import int_list
from tests.benchmarks.shapes import bench


def test_lists_of_numbers() -> None:
    assert int_list("256") == (256,)
    assert int_list("8,2,8, 4") == (8, 2, 4)


@pytest.mark.parametrize("text", ["", "a", "1,,2", "0", "3,-1", "1.5"])
def test_anything_else_is_refused(text: str) -> None:
    with pytest.raises(click.BadParameter, match="expected numbers from 1 on"):
        int_list(text)


def test_a_wrong_list_is_a_usage_error() -> None:
    result = bench("peers", "--context", "256,x")
    assert result.exit_code == 2 and "--context" in result.stderr and "separated by commas" in result.stderr


def test_every_option_says_what_it_is_by_itself() -> None:
    """Its help is read alone: neither a fragment such as "Of prefill." nor nothing."""
    poor = [
        f"{name} {option.opts[0]}: {option.help}"
        for name, command in main.commands.items()
        for option in command.params
        if isinstance(option, click.Option)
        and (option.help is None or len(option.help.split()) < 3 or option.help.startswith(("Of ", "Ours")))
    ]
    assert poor == []
