from __future__ import annotations

import sys
from pathlib import Path

import pytest

from cpm_edge.benchmarks.errors import BenchError
from cpm_edge.benchmarks.peers.llama_cpp import LlamaCppPeer, single_row

ROW = '[{"avg_ts": 61.5, "build_commit": "abc", "build_number": 7}]'


def program(folder: Path, code: str) -> Path:
    """A program that stands in for llama-bench."""
    path = folder / "llama-bench"
    path.write_text(f"#!{sys.executable}\nimport sys\n{code}\n")
    path.chmod(0o755)
    return path


def test_the_rate_and_the_arguments(tmp_path: Path) -> None:
    args = str(tmp_path / "args")
    binary = program(tmp_path, f"print(*sys.argv[1:], file=open({args!r}, 'a'))\nprint('''{ROW}''')")
    peer = LlamaCppPeer(binary, tmp_path / "m.gguf", "Q4_0", threads=2, flash=1)
    assert peer.label == "llama.cpp Q4_0, -fa 1"
    assert peer.prefill(512) == peer.decode(256, 32) == 61.5
    assert peer.build == "abc (7)"
    prefill, decode = (tmp_path / "args").read_text().splitlines()
    assert "-fa 1" in prefill and prefill.endswith("-p 512 -n 0")
    assert decode.endswith("-p 0 -n 32 -d 256")


def test_failures_say_what_llama_bench_said(tmp_path: Path) -> None:
    binary = program(tmp_path, "sys.exit('no such model')")
    peer = LlamaCppPeer(binary, tmp_path / "m.gguf", "Q4_0", threads=2, flash=0)
    with pytest.raises(BenchError, match="status 1: no such model"):
        peer.prefill(8)
    gone = LlamaCppPeer(tmp_path / "gone", tmp_path / "m.gguf", "Q4_0", threads=2, flash=0)
    with pytest.raises(BenchError, match="cannot be started"):
        gone.prefill(8)


@pytest.mark.parametrize("output", ["", "[]", "{}", '[{"x": 1}]', '[{"avg_ts": 1}, {"avg_ts": 2}]'])
def test_other_output_is_refused(output: str) -> None:
    with pytest.raises(BenchError, match="expected a JSON array of one measurement"):
        single_row(output)
