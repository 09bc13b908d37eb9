"""The whole subcommand on a tiny sparse shape; the numbers mean nothing, their places do."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from cpm_edge.benchmarks.artifacts import Artifacts
from tests.benchmarks.peers.test_llama_cpp import ROW, program
from tests.benchmarks.shapes import bench, in_this_process, write_shape
from tests.support.bundles import Bundles
from tests.support.checkpoints import VARIANTS


@pytest.fixture(autouse=True)
def in_process(bundles: Bundles, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without a child process for exports, and with every graph traced once."""
    monkeypatch.setattr(Artifacts, "run", in_this_process)
    monkeypatch.setattr("cpm_edge.benchmarks.context.decode.read_bandwidth", lambda threads, repeat: 2e10)
    monkeypatch.setattr("cpm_edge.benchmarks.context.prefill.SPAN", 96)


def test_every_table(tmp_path: Path) -> None:
    shape = write_shape(tmp_path, VARIANTS["sparse"])
    llama = program(tmp_path, f"print('''{ROW}''')")
    result = bench(
        *["context", "--shape", shape, "--context", "300,20", "--new-tokens", 3, "--repeat", 1],
        *["--prefill-to", 192, "--peer-context", 96, "--llama-bench", llama, "--json", tmp_path / "out.json"],
    )
    assert result.exit_code == 0, result.output
    results = json.loads((tmp_path / "out.json").read_text())["results"]
    speeds = results["decode"]["tokens_per_second"]
    assert set(speeds) == {"sparse", "dense", "llama.cpp Q4_0, -fa 0", "llama.cpp Q4_0, -fa 1"}
    assert set(speeds["sparse"]) == set(speeds["dense"]) == {"20", "300"}
    assert speeds["llama.cpp Q4_0, -fa 1"] == {"20": [61.5]}, "peers stop at --peer-context"
    for row in ("sparse", "dense"):
        assert all(seconds > 0 for (seconds,) in results["decode"]["attention_seconds"][row].values())
    # 2 layers, 2 kv heads of 16 halves. Sparse rows read 5 blocks of 16, the last up to the row, and windows.
    roofline = results["decode"]["roofline"]
    per_row = 2 * 2 * 2 * 16 * 2
    assert roofline["dense"]["300"]["cache_bytes"] == per_row * 302
    assert roofline["sparse"]["20"]["cache_bytes"] == per_row * 22
    sparse = [4 * 16 + position % 16 + 1 for position in (300, 301, 302)]
    windows = [(position + 1 - 8) // 4 + 1 for position in (300, 301, 302)]
    expected = sum(per_row * rows + 2 * 2 * 16 * 4 * n for rows, n in zip(sparse, windows, strict=True)) / 3
    assert roofline["sparse"]["300"]["cache_bytes"] == pytest.approx(expected)

    prefill = results["prefill"]
    assert [(span["first"], span["stop"]) for span in prefill["ours"]] == [(0, 96), (96, 192)]
    assert len(prefill["attention"]["sparse"]) == len(prefill["attention"]["dense"]) == 2
    assert [span["stop"] for span in prefill["stock"]] == [96]
    assert prefill["summary"]["stock_is_extrapolated"] and prefill["summary"]["ours_over_stock"] > 0

    memory = results["memory"]
    assert memory["context"] == 300 and memory["keys_and_values"] == 2 * 2 * 2 * 16 * 2 * 300
    assert memory["pooled_keys"] == 2 * 2 * 16 * 4 * 300 // 4
    parts = ("weights", "keys_and_values", "pooled_keys", "states", "scratch", "rest")
    assert sum(memory[part] for part in parts) == memory["resident"] <= memory["peak"]


def test_parts_that_were_not_asked_for_are_left_out(tmp_path: Path) -> None:
    shape = write_shape(tmp_path, VARIANTS["sparse"])
    result = bench(
        *["context", "--shape", shape, "--context", 40, "--new-tokens", 1, "--repeat", 1],
        *["--prefill-to", 0, "--no-dense", "--json", tmp_path / "out.json"],
    )
    assert result.exit_code == 0, result.output
    report = json.loads((tmp_path / "out.json").read_text())
    assert set(report["results"]["decode"]["tokens_per_second"]) == {"sparse"}
    assert "prefill" not in report["results"]
    assert report["notes"] == ["llama.cpp was not measured: give --llama-bench PATH"]


def test_recurrent_layers_have_tables_of_their_own(tmp_path: Path) -> None:
    shape = write_shape(tmp_path, VARIANTS["sala"])
    result = bench(
        *["context", "--shape", shape, "--context", "40,300", "--new-tokens", 2, "--repeat", 1],
        *["--prefill-to", 0, "--no-dense", "--json", tmp_path / "out.json"],
    )
    assert result.exit_code == 0, result.output
    report = json.loads((tmp_path / "out.json").read_text())
    seconds = report["results"]["decode"]["attention_seconds"]["recurrent"]
    assert set(seconds) == {"40", "300"} and all(value > 0 for (value,) in seconds.values())
    # 2 layers of 2 heads of 16: keys and values of 2 bytes, a pooled float for 4 keys; 2 states.
    state = 2 * 4 * 24 * 24 * 4
    for context, kept in ((int(key), value) for key, value in report["results"]["kept_bytes"].items()):
        assert kept["keys_and_values"] == 2 * 2 * 2 * 16 * 2 * context
        assert kept["pooled_keys"] == 2 * 2 * 16 * context
        assert (kept["states"], kept["snapshots"]) == (state, state)
    assert report["results"]["memory"]["states"] >= 2 * state
    assert any("a recurrent layer reads and writes a state of 0.01 MB" in note for note in report["notes"])
