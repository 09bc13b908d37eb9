from __future__ import annotations

import io
from pathlib import Path

import pytest
from click.testing import CliRunner
from rich.console import Console

from cpm_edge.exporter import cli, model_table
from cpm_edge.exporter.releases import RELEASES
from tests.source_tree import ROOT


def test_the_readme_shows_the_table_of_now() -> None:
    page = (ROOT / "README.md").read_text(encoding="utf-8")
    assert page == model_table.updated(page), "the table of models is out of date; run: make readme"


def test_the_table_replaces_only_itself(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text(f"before\n{model_table.BEGIN}old\n{model_table.END}after\n")
    model_table.main(page)
    text = page.read_text()
    assert text.startswith("before\n") and text.endswith("after\n") and "old" not in text
    assert text.count("\n| ") == len(RELEASES) + 1
    model_table.main(page)
    assert page.read_text() == text
    with pytest.raises(ValueError, match="expected the marks"):
        model_table.updated("no marks")


def test_a_pipe_gets_one_line_a_model() -> None:
    result = CliRunner().invoke(cli.main, ["--list-models"])
    lines = result.stdout.splitlines()
    assert result.exit_code == 0 and len(lines) == len(RELEASES) + 1
    # Every column begins where its heading does, so cut(1) and the eye find it.
    start = lines[0].index("targets")
    assert all(line[start:].startswith("ort, aipc") and line[start - 1] == " " for line in lines[1:])
    assert "\x1b" not in result.stdout and "│" not in result.stdout


def test_a_terminal_gets_a_table_with_its_legend() -> None:
    console = Console(width=200, force_terminal=True, record=True, file=io.StringIO())
    console.print(model_table.rich_table())
    text = console.export_text()
    assert "┃ model" in text and "real weights: " in text
    assert all(release.names in text for release in RELEASES)
