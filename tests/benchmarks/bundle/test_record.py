"""Reading records: what they say, and what is refused."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console

from cpm_edge.benchmarks.bundle.compare import compare_html, compare_notes, compare_table
from cpm_edge.benchmarks.bundle.record import Record, check_record, read_record
from cpm_edge.benchmarks.errors import BenchError
from tests.benchmarks.bundle.records import RECORD, changed


def test_a_decode_speed_leaves_the_first_token_out() -> None:
    short, long = check_record(RECORD, "x.json").at()
    assert short.rate.values == [pytest.approx(3 / 0.121), pytest.approx(3 / 0.132)]
    assert short.first.median == pytest.approx(0.055)
    assert long.ceiling == pytest.approx(153.6e9 / 4.5e9)
    assert long.ceiling is not None
    assert long.share == pytest.approx(long.rate.median / long.ceiling)
    assert long.predicted == (21.5, 27.5)


def test_a_newer_schema_is_refused_with_the_way_out() -> None:
    with pytest.raises(BenchError, match="schema 2 is newer") as error:
        check_record(changed(("schema",), 2), "x.json")
    assert error.value.hint is not None and "--upgrade" in error.value.hint


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        (("benchmark",), "peers", "benchmark: expected 'run', got 'peers'"),
        (("schema",), "1", "schema: expected a whole number"),
        (("results",), None, "results: expected dict, got None"),
        (("results", "contexts"), [], "results.contexts: expected at least one"),
        (
            ("results", "contexts", 1, "step_seconds"),
            [[0.1], []],
            "contexts[1].step_seconds: expected a list",
        ),
        (("results", "contexts", 0, "first_token_seconds"), [0], "contexts[0].first_token_seconds"),
        (("results", "contexts", 0, "read_bytes"), None, "contexts[0].read_bytes"),
        (("results", "bundle", "name"), 3, "results.bundle.name: expected printable text, got 3"),
        (("results", "chip"), {}, "results.chip.id: expected printable text, got None"),
        (("results", "contexts", 0, "predicted"), {"high": 9.0}, "contexts[0].predicted: expected null, or"),
        (("results", "contexts", 0, "context"), 10**400, "contexts[0].context: expected a number of tokens"),
        (("results", "contexts", 0, "context"), True, "contexts[0].context: expected a number of tokens"),
        (("results", "contexts", 0, "step_seconds"), [[5e-324]], "contexts[0].step_seconds: expected a list"),
        (("results", "bundle", "name"), "a\x1b[31m", "results.bundle.name: expected printable text"),
        (("results", "bundle", "name"), "\ud800", "results.bundle.name: expected printable text"),
        (("results", "memory", "peak"), -5, "results.memory.peak: expected bytes, got -5"),
        (("time",), 7, "time: expected str, got 7"),
    ],
)
def test_a_damaged_record_is_refused(path: tuple[Any, ...], value: Any, message: str) -> None:
    with pytest.raises(BenchError) as error:
        check_record(changed(path, value), "x.json")
    assert message in error.value.message


@pytest.mark.parametrize("text", [json.dumps(RECORD)[:-40], "[" * 200_000], ids=["cut off", "deep"])
def test_a_file_that_is_no_json(tmp_path: Path, text: str) -> None:
    file = tmp_path / "run.json"
    file.write_text(text)
    with pytest.raises(BenchError, match="expected the JSON of cpm-bench run"):
        read_record(file)


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
    max_leaves=5,
)
PATHS = [("results", key) for key in RECORD["results"]] + [(key,) for key in RECORD]


@given(st.sampled_from(PATHS), json_values)
def test_any_damage_is_an_error_of_ours_or_harmless(path: tuple[str, ...], value: Any) -> None:
    try:
        record = check_record(changed(path, value), "x.json")
    except BenchError:
        return
    assert list(record.at())
    shown_everywhere(record)


NUMBERS = st.integers() | st.floats(allow_nan=False) | st.just(True)


@given(st.sampled_from(["context", "first_token_seconds", "step_seconds", "read_bytes"]), NUMBERS)
def test_any_number_is_an_error_of_ours_or_can_be_shown(key: str, value: float) -> None:
    wrapped: Any = {"first_token_seconds": [value], "step_seconds": [[value]]}.get(key, value)
    try:
        record = check_record(changed(("results", "contexts", 0, key), wrapped), "x.json")
    except BenchError:
        return
    shown_everywhere(record)


@given(st.text(max_size=20) | st.sampled_from(["[/red] [bold]", "[/]", "<b>", "a|b"]))
def test_any_name_is_an_error_of_ours_or_shown_as_it_is(name: str) -> None:
    try:
        record = check_record(changed(("results", "bundle", "name"), name), "x.json")
    except BenchError:
        return
    assert name in shown_everywhere(record)


def shown_everywhere(record: Record) -> str:
    """A terminal's text, once pages were made too."""
    compare_html([record, record]).encode()
    console = Console(file=io.StringIO(), width=10_000, markup=False, highlight=False, emoji=False)
    console.print(compare_table([record, record]))
    for note in compare_notes([record, record]):
        console.print(note)
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()
