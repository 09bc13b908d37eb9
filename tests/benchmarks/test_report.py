from __future__ import annotations

import json
from pathlib import Path

import pytest
from rich.table import Table

from cpm_edge.benchmarks.errors import BenchError
from cpm_edge.benchmarks.report import Report, check_file


def test_everything_is_printed_and_kept(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    table = Table("what", "value")
    table.add_row("speed", "12.5")
    report = Report("peers", {"repeat": 3}, {"rates": [1.0]}, [table], ["[peer] was skipped"], {"peer": "v1"})
    report.publish(tmp_path / "out.json")
    printed = capsys.readouterr().out
    assert "speed" in printed and "note: [peer] was skipped" in printed
    kept = json.loads((tmp_path / "out.json").read_text())
    assert (kept["schema"], kept["benchmark"], kept["settings"]) == (1, "peers", {"repeat": 3})
    assert kept["results"] == {"rates": [1.0]} and kept["notes"] == ["[peer] was skipped"]
    assert kept["versions"]["peer"] == "v1" and kept["versions"]["cpm-edge"]
    assert kept["machine"]["cores"] >= 1 and kept["machine"]["cpu"]


def test_a_file_that_cannot_be_written_is_refused_before_measuring(tmp_path: Path) -> None:
    check_file(None)
    check_file(tmp_path / "new.json")
    for bad in (tmp_path, tmp_path / "missing" / "out.json"):
        with pytest.raises(BenchError, match=": expected a file in a folder that can be written"):
            check_file(bad)
