"""``optimum-cli export cpm`` as a user calls it, against ``cpm-export``."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPTS = Path(sys.executable).parent
OPTIMUM = "optimum-cli export cpm"


def run(command: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    name, *words = command.split()
    environment = {**os.environ, "COLUMNS": "100", "NO_COLOR": "1"}
    line = [str(SCRIPTS / name), *words, *arguments]
    return subprocess.run(line, capture_output=True, text=True, env=environment, check=False)


@pytest.mark.parametrize(
    ("arguments", "code"),
    [
        (["--help"], 0),
        ([], 2),
        (["--model", "no-such-folder", "--target", "ort", "-o", "out"], 1),
        (["-m", "x", "-t", "ort", "-o", "out", "--group-size", "48"], 2),
        (["-m", "x", "-t", "ort", "-o", "out", "--no-such-option"], 2),
        (["-m", "x", "-t", "ort", "-o", "out", "--", "left over"], 2),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else None,
)
def test_both_commands_say_the_same(
    arguments: list[str], code: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    ours, theirs = run("cpm-export", *arguments), run(OPTIMUM, *arguments)
    assert theirs.returncode == ours.returncode == code, theirs.stderr
    for a, b in ((ours.stdout, theirs.stdout), (ours.stderr, theirs.stderr)):
        assert b.replace(OPTIMUM, "cpm-export") == a
    assert list(tmp_path.iterdir()) == []


def test_optimum_lists_it() -> None:
    listed = run("optimum-cli export", "--help")
    assert listed.returncode == 0
    assert "cpm-edge bundles" in listed.stdout
