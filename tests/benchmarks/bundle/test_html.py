"""The pages: what they say, and that a browser shows all of it without asking the network."""

from __future__ import annotations

import json
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from cpm_edge.benchmarks.bundle.compare import compare_html, names
from cpm_edge.benchmarks.bundle.html import report_html
from cpm_edge.benchmarks.bundle.markdown import report_markdown
from cpm_edge.benchmarks.bundle.record import check_record
from cpm_edge.benchmarks.bundle.verdict import verdict
from cpm_edge.benchmarks.cli import main
from tests.benchmarks.bundle.browser import BROWSER, looked_at
from tests.benchmarks.bundle.records import RECORD, changed

LOADED = "other processes kept 83% of this machine busy meanwhile: these numbers are lower bounds"


def pages() -> dict[str, str]:
    record = check_record(RECORD, "a.json")
    others = [check_record(changed(("results", "chip", "id"), chip), "b.json") for chip in ("x", "y")]
    return {"report": report_html(record), "comparison": compare_html([record, *others])}


def test_the_report_says_what_was_measured() -> None:
    page = pages()["report"]
    for text in (
        "MiniCPM4-8B-int4",
        "of what the memory allows",
        "inside the predicted",
        "cpm-bench run MiniCPM4-8B-int4 -o report.html",
        "&lt;MiniCPM4&gt;",
        "openvino",
    ):
        assert text in page, text
    assert "MiniCPM4-8B, published: OpenVINO documentation" in page  # the same model on the same chip


def test_a_loaded_machine_is_said_at_the_top() -> None:
    record = check_record(changed(("notes",), [LOADED]), "a.json")
    page = report_html(record)
    assert page.index(LOADED) < page.index("<h2>Speed</h2>")
    assert LOADED in report_markdown(record)


def test_markdown_says_all_that_the_page_does() -> None:
    accuracy = {
        "perplexity": 10.9, "reference_perplexity": 10.4, "kl": 0.05, "top1": 0.9, "tokens": 2048,
        "greedy": {"summary": "3 of 4 continuations of 64 tokens are the same"},
        "reference": "MiniCPM4-8B", "text": "book.txt",
    }  # fmt: skip
    text = report_markdown(check_record(changed(("results", "accuracy"), accuracy), "a.json"))
    for part in (
        "| context | first token, s | predicted | prefill, tok/s | TPOT, ms |",
        "22.0 to 28.0",
        "0.04 to 0.08",
        "| peak | 5100 MB |",
        "| predicted by the plan | 5440 MB: weights 4600, cache 40, workspace 100, base 700 |",
        "| perplexity | 10.900, the reference's 10.400 |",
        "| temperature | 50.00 °C before, 61.00 °C after |",
        "| cpu | Some CPU |",
        "| largest files | openvino_model.bin 4870 MB |",
        "# <MiniCPM4>",
        "MiniCPM4-8B, published: OpenVINO documentation",
    ):
        assert part in text, part


@pytest.mark.parametrize(("factor", "word"), [(0.5, "below"), (1.0, "inside"), (2.0, "above")])
def test_a_verdict_tells_where_a_prediction_was_missed(factor: float, word: str) -> None:
    steps = [[0.04 / factor] * 3] * 2
    record = check_record(changed(("results", "contexts", 0, "step_seconds"), steps), "a.json")
    assert f"{word} the predicted 22.0 to 28.0" in verdict(record)


def test_published_runs_are_of_the_same_device() -> None:
    record = check_record(changed(("settings", "device"), "CPU"), "a.json")
    assert "published" not in report_html(record)


def test_runs_of_one_name_are_told_apart() -> None:
    records = [check_record(RECORD, f"{folder}/run.json") for folder in ("before", "after")]
    assert len(set(names(records))) == 2


def test_a_comparison_has_a_line_for_every_record() -> None:
    page = pages()["comparison"]
    assert page.count("<polyline") == 3
    assert len(set(re.findall(r'class="line (s\d)"', page))) == 3


class Balanced(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []

    def handle_starttag(self, tag: str, attrs: Any) -> None:
        if tag not in ("meta", "link", "br"):
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_startendtag(self, tag: str, attrs: Any) -> None: ...


@pytest.mark.parametrize("name", ["report", "comparison"])
def test_a_page_is_whole_and_names_no_other_place(name: str) -> None:
    page = pages()[name]
    parser = Balanced()
    parser.feed(page)
    assert parser.open == []
    assert "<script" not in page and "url(" not in page and "@import" not in page
    assert not re.search(r'(?:src|href)="(?!data:)', page)


@pytest.mark.skipif(BROWSER is None, reason="no chromium here; .ci/run installs it")
@pytest.mark.parametrize("width", [390, 1000])
@pytest.mark.parametrize("name", ["report", "comparison"])
def test_a_browser_shows_every_chart(tmp_path: Path, name: str, width: int) -> None:
    found = looked_at(tmp_path, pages()[name], width)
    assert found["errors"] == [] and found["requests"] == 0
    assert found["width"] <= found["window"] == width
    assert len(found["sizes"]) == (4 if name == "report" else 1) and min(found["sizes"]) > 300


def test_compare_on_the_command_line(tmp_path: Path) -> None:
    files = []
    for number, chip in enumerate(("core-ultra-7-358h", "core-ultra-7-258v", "ddr5-laptop")):
        files.append(tmp_path / f"{number}.json")
        content = changed(("results", "chip", "id"), chip)
        files[-1].write_text(json.dumps({**content, "notes": [LOADED] if number == 1 else []}))
    output = tmp_path / "chips.html"
    result = CliRunner().invoke(main, ["compare", *map(str, files), "-o", str(output)])
    assert result.exit_code == 0, result.output
    assert "within the spread" in output.read_text()
    assert [line for line in result.stdout.replace("\n", " ").split("note: ") if "83% of" in line]
    assert "1.00" in result.stdout and output.read_text().count("<polyline") == 3
    files[1].write_text(json.dumps(changed(("schema",), 9)))
    refused = CliRunner().invoke(main, ["compare", *map(str, files)])
    assert refused.exit_code == 1 and "schema 9 is newer" in refused.stderr
