"""The whole subcommand on a tiny shape; the numbers mean nothing, their places do."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from cpm_edge.benchmarks.artifacts import Artifacts
from cpm_edge.benchmarks.errors import BenchError
from cpm_edge.benchmarks.peers.lineup import Wanted
from tests.bad_input.bench import refused
from tests.benchmarks.peers.test_llama_cpp import ROW, program
from tests.benchmarks.shapes import bench, in_this_process, write_shape
from tests.support.bundles import Bundles

OURS, STOCK = "ours, native int4 g32", "ours, stock (OpenVINO) int4 g128"


@pytest.fixture(autouse=True)
def in_process(bundles: Bundles, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without a child process, and with every graph traced once."""
    monkeypatch.setattr(Artifacts, "run", in_this_process)
    monkeypatch.setattr("cpm_edge.benchmarks.peers.comparison.read_bandwidth", lambda threads, repeat: 2e10)


def test_ours_and_every_peer(tmp_path: Path) -> None:
    """Our stock bundle stands in for somebody else's IR: it is one, with another set of inputs."""
    common = ["--shape", write_shape(tmp_path), "--context", "5,20", "--prefill", 16, "--new-tokens", 3]
    common += ["--repeat", 2, "--bundle-cache", tmp_path / "cache", "--json", tmp_path / "out.json"]
    first = bench("peers", *common, "--no-stock")
    assert first.exit_code == 0, first.output
    made = {path: path.stat().st_mtime_ns for path in (tmp_path / "cache").rglob("*")}
    (folder,) = (tmp_path / "cache").iterdir()
    result = bench("peers", *common)
    assert result.exit_code == 0, result.output
    stock = next(path for path in folder.iterdir() if path.name.startswith("stock-"))
    llama = program(tmp_path, f"print('''{ROW}''')")
    result = bench("peers", *common, "--no-stock", "--llama-bench", llama, "--openvino-ir", stock)
    assert result.exit_code == 0, result.output
    assert all(path.stat().st_mtime_ns == time for path, time in made.items() if path.is_file()), "made once"

    report = json.loads((tmp_path / "out.json").read_text())
    rates = report["results"]["rates"]
    assert list(rates) == [OURS, "llama.cpp Q4_0, -fa 0", "llama.cpp Q4_0, -fa 1", "OpenVINO IR"]
    for each in rates.values():
        assert len(each["prefill"]) == 2 and set(each["decode"]) == {"5", "20"}
        assert all(rate > 0 for rate in each["prefill"] + each["decode"]["5"])
    assert rates["llama.cpp Q4_0, -fa 1"]["decode"]["20"] == [61.5, 61.5]
    roofline = report["results"]["roofline"][OURS]
    # Keys and values of 2 layers and 2 kv heads of 32 halves; three steps from 5 and from 20 on.
    assert roofline["5"]["cache_bytes"] == 2 * 2 * 2 * 32 * 2 * 7
    assert roofline["20"]["cache_bytes"] == 2 * 2 * 2 * 32 * 2 * 22
    assert report["results"]["linear_share_of_bf16"][OURS] == 18 / 64
    assert report["results"]["bandwidth"] == [2e10, 2e10]
    assert report["versions"]["llama.cpp"] == "abc (7)" and report["versions"]["openvino (IR)"]


def test_what_is_absent_is_skipped_with_a_note(tmp_path: Path) -> None:
    result = bench(
        *["peers", "--shape", write_shape(tmp_path), "--context", 4, "--prefill", 4, "--new-tokens", 1],
        *["--repeat", 1, "--no-stock", "--json", tmp_path / "out.json"],
    )
    assert result.exit_code == 0, result.output
    report = json.loads((tmp_path / "out.json").read_text())
    assert list(report["results"]["rates"]) == [OURS]
    notes = "\n".join(report["notes"])
    assert "llama.cpp was not measured: give --llama-bench PATH" in notes
    assert "no other OpenVINO IR was measured: give --openvino-ir DIR or --optimum-cli PATH" in notes
    assert "llama.cpp was not measured" in result.output


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--llama-bench", "gone"], "--llama-bench: expected a program, got gone, which does not exist"),
        (["--optimum-cli", "gone"], "--optimum-cli: expected a program, got gone"),
        (
            ["--openvino-ir", "."],
            "--openvino-ir: expected a folder with openvino_model.xml, got ., which has no",
        ),
        (["--openvino-ir", "gone"], "--openvino-ir: expected a folder with openvino_model.xml, got gone"),
        (["--openvino-python", "gone"], "--openvino-python: expected a program, got gone"),
    ],
)
def test_what_is_given_and_absent_is_refused_before_anything_is_made(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, arguments: list[str], says: str
) -> None:
    monkeypatch.chdir(tmp_path)
    result = bench("peers", "--shape", write_shape(tmp_path), "--bundle-cache", "cache", *arguments)
    refused(result).says(says, hint="check the path, or leave the option out")
    assert not (tmp_path / "cache").exists()


def test_an_ir_that_is_to_be_made_need_not_exist(tmp_path: Path) -> None:
    cli = program(tmp_path, "")
    Wanted("int4", "auto", 1, openvino_ir=tmp_path / "later", optimum_cli=cli).check_paths()
    with pytest.raises(BenchError, match="which has no"):
        Wanted("int4", "auto", 1, openvino_ir=tmp_path, optimum_cli=cli).check_paths()


def test_an_ir_that_cannot_be_opened_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "openvino_model.xml").write_text("<net/>")
    result = bench(
        *["peers", "--shape", write_shape(tmp_path), "--no-stock", "--repeat", 1],
        *["--openvino-ir", tmp_path],
    )
    refused(result).says("OpenVINO IR: its process ended with status 1", hint="--openvino-python")


def test_a_result_file_that_cannot_be_written_is_refused_at_once(tmp_path: Path) -> None:
    result = bench("peers", "--json", tmp_path / "missing" / "out.json")
    refused(result).says("out.json: expected a file in a folder", hint="make the folder")
