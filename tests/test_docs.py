"""The documentation is true: its commands parse, its Python runs, its links and file names exist."""

from __future__ import annotations

import re
import runpy
import shlex
from pathlib import Path
from typing import Any

import click
import pytest

import cpm_edge.benchmarks.cli
import cpm_edge.exporter.cli
import cpm_edge.runtimes.cli
from tests.source_tree import ROOT
from tests.support.bundles import TARGETS, Bundles

PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
COMMANDS: dict[str, click.Command] = {
    "cpm-export": cpm_edge.exporter.cli.main,
    "cpm-run": cpm_edge.runtimes.cli.main,
}
MEASUREMENTS: dict[str, click.Command] = {
    f"cpm-bench {name}": command for name, command in cpm_edge.benchmarks.cli.main.commands.items()
}
ALL = {**COMMANDS, "cpm-bench": cpm_edge.benchmarks.cli.main, **MEASUREMENTS}
FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
OF_OTHERS = {"--index-url", "--no-build-isolation", "--no-deps", "--system-site-packages"}


def blocks(page: Path, *languages: str) -> list[str]:
    """Contents of the fenced blocks in these languages; "" is a fence without one."""
    found = FENCE.findall(page.read_text(encoding="utf-8"))
    return [text for language, text in found if language in languages]


def command_lines() -> list[tuple[str, str]]:
    """(page, command line) of our commands in every page and in the epilogs of --help."""
    sources = [(page.name, text) for page in PAGES for text in blocks(page, "", "console")]
    sources += [(f"{name} --help", command.epilog or "") for name, command in ALL.items()]
    found = []
    for source, text in sources:
        for line in text.splitlines():
            line = line.strip().removeprefix("$ ").removeprefix(".venv/bin/")
            line = line.split(" | ")[-1].replace("optimum-cli export cpm", "cpm-export")
            if line.split(" ")[0] in ALL:
                found.append((source, line))
    return found


def name_of(line: str) -> str:
    """The command, with the subcommand where there are any."""
    words = line.split()
    return " ".join(words[:2]) if words[0] == "cpm-bench" else words[0]


@pytest.mark.parametrize(("source", "line"), command_lines())
def test_commands_parse(source: str, line: str, capsys: pytest.CaptureFixture[str]) -> None:
    # What stands in the second column of an example list is a comment.
    line = re.split(r"\s{2,}", line.split(" #")[0])[0]
    name = name_of(line)
    try:
        ALL[name].make_context(name, shlex.split(line.removeprefix(name)))
    except click.exceptions.Exit as done:
        assert done.exit_code == 0


def test_the_commands_were_found() -> None:
    found = command_lines()
    for name in COMMANDS:
        assert sum(line.startswith(name) for _, line in found) >= 8
    assert {name_of(line) for _, line in found} == {*COMMANDS, *MEASUREMENTS}
    assert any(source == "README.md" and ".gguf" in line for source, line in found)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_option_exists(page: Path) -> None:
    known = {
        option
        for command in ALL.values()
        for parameter in command.params
        for option in (*parameter.opts, *parameter.secondary_opts)
    }
    mentioned = set(re.findall(r"(?<![\w-])--[a-z][a-z-]+", page.read_text(encoding="utf-8")))
    assert mentioned - known - OF_OTHERS - {"--help"} == set()


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_link_and_path_exists(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    links = re.findall(r"\]\(([^)#:]+)\)", text)
    assert [link for link in links if not (page.parent / link).exists()] == []
    roots = r"(?:exporter|quant|plugins|runtimes|benchmarks|tests|docs|examples)/"
    paths = re.findall(rf"`({roots}[\w./]*)`", text)
    assert [path for path in paths if not (ROOT / path).exists()] == []


def test_every_make_target_exists() -> None:
    targets = re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
    for page in PAGES:
        assert set(re.findall(r"`make ([a-z]+)", page.read_text(encoding="utf-8"))) <= set(targets)


@pytest.fixture
def bundle(bundles: Bundles, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A tiny bundle that lies where the pages say."""
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "bundle"
    path.symlink_to(bundles.open("llama", "ort").path)
    return path


def test_the_python_of_the_readme(bundle: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (code,) = blocks(ROOT / "README.md", "python")
    names: dict[str, Any] = {}
    exec(compile(code, "README.md", "exec"), names)
    try:
        assert names["logits"].shape == names["rows"].shape[1:]
        assert capsys.readouterr().out.splitlines()[-1].split() == [
            str(names["session"].position),
            str(names["session"].position + 3),
        ]
    finally:
        names["model"].close()


def test_the_streaming_example(
    bundle: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("sys.argv", ["stream.py", "bundle", "hi"])
    runpy.run_path(str(ROOT / "examples/stream.py"), run_name="__main__")
    assert "tok/s" in capsys.readouterr().err


def test_the_chat_example(
    bundle: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    lines = iter(["hi", "go on", ""])
    monkeypatch.setattr("builtins.input", lambda _: next(lines))
    monkeypatch.setattr("sys.argv", ["chat.py", "bundle"])
    runpy.run_path(str(ROOT / "examples/chat.py"), run_name="__main__")
    assert capsys.readouterr().out.count("model: ") == 2


@pytest.mark.parametrize("target", TARGETS)
def test_the_manifest_page_names_every_key(bundles: Bundles, target: str) -> None:
    manifest = bundles.open("sparse", target).manifest.to_json()
    page = (ROOT / "docs/bundle.md").read_text(encoding="utf-8")
    keys = [*manifest, *(key for part in ("context", "engine", "weights", "cache") for key in manifest[part])]
    assert [key for key in keys if f"`{key}`" not in page] == []
