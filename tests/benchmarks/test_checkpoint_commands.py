"""agreement, perplexity and export from end to end on a tiny random checkpoint that cpm-bench wrote."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path

import pytest

from cpm_edge.benchmarks import export_peers, perplexity
from cpm_edge.benchmarks.errors import BenchError
from cpm_edge.benchmarks.export_peers import BUILDER, PEER, measure
from tests.benchmarks.shapes import bench, write_shape
from tests.support.bundles import Bundles


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    shape = write_shape(folder, tie_word_embeddings=False, max_position_embeddings=1024)
    result = bench("checkpoint", "--shape", shape, "--layers", 1, "-o", folder / "random")
    assert result.exit_code == 0, result.output
    return folder / "random"


def test_agreement(checkpoint: Path, bundles: Bundles, tmp_path: Path) -> None:
    result = bench("agreement", "--model", checkpoint, "--tokens", 5, "--json", tmp_path / "out.json")
    found = json.loads((tmp_path / "out.json").read_text())["results"]
    assert result.exit_code == (0 if found["holds"] else 1), result.output
    names = [row["runtime"] for row in found["rows"]]
    assert names == [
        *["cpm_edge aipc", "openvino_genai", "openvino runtime model"],
        *["cpm_edge ort", "onnxruntime_genai"],
        "cpm_edge aipc native",
    ]
    assert found["holds"], found["rows"]


def test_perplexity(
    checkpoint: Path, bundles: Bundles, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(perplexity, "ROWS", [("int8", {"weight_format": "int8"}, "fp")])
    monkeypatch.setattr(perplexity, "WINDOWS", 1)
    text = tmp_path / "text.txt"
    text.write_text("the quick brown fox " * 3000)
    file = tmp_path / "out.json"
    result = bench("perplexity", "--model", checkpoint, "--text", text, "--target", "ort", "--json", file)
    assert result.exit_code == 0, result.output
    (row,) = json.loads(file.read_text())["results"]["perplexity"].values()
    # Random weights know nothing: every token of the 320 is about as likely.
    assert all(100 < value < 1000 for value in row.values()) and len(row) == 2


def command(size: int, seconds: float = 0.0) -> list[str]:
    """Stands in for an exporter: its last argument is the folder to make."""
    code = (
        "import pathlib, sys, time; folder = pathlib.Path(sys.argv[-1]); folder.mkdir(); "
        f"(folder / 'model.bin').write_bytes(bytes({size})); time.sleep({seconds})"
    )
    return [sys.executable, "-c", code]


def test_export(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        export_peers, "_our_commands", lambda folder, *_: {"ours": [*command(1000), str(folder / "out")]}
    )
    optimum = tmp_path / "optimum-cli"
    optimum.write_text(f"#!{sys.executable}\n{command(3000, 0.2)[2]}\n")
    optimum.chmod(0o755)
    builder = tmp_path / "python"
    make = "import pathlib, sys; a = sys.argv; assert a[2].endswith('models.builder') and 'int4' in a; "
    make += "f = pathlib.Path(a[a.index('-o') + 1]); f.mkdir(); (f / 'm').write_bytes(bytes(2000))"
    builder.write_text(f"#!{sys.executable}\n{make}\n")
    builder.chmod(0o755)
    result = bench(
        *[
            "export",
            "--shape",
            write_shape(tmp_path),
            "--layers",
            1,
            "--repeat",
            2,
            "--genai-python",
            builder,
        ],
        *["--optimum-cli", optimum, "--json", tmp_path / "out.json"],
    )
    assert result.exit_code == 0, result.output
    found = json.loads((tmp_path / "out.json").read_text())["results"]
    assert list(found) == ["ours", PEER, BUILDER]
    assert found[BUILDER]["output_bytes"] == 2000
    assert found["ours"]["output_bytes"] == 1000 and found[PEER]["output_bytes"] == 3000
    assert len(found["ours"]["seconds"]) == 2 and min(found[PEER]["seconds"]) > 0.2
    assert all(peak > 1 << 20 for peak in found[PEER]["peak_bytes"])
    assert len(re.findall(r"\d\.\d\dx", result.output)) == 4  # time and memory of two peers


def test_a_failed_command_says_why(tmp_path: Path) -> None:
    with pytest.raises(BenchError, match=r"(?s)failed:.*no space"):
        measure([sys.executable, "-c", "import sys; sys.exit('no space')"], tmp_path / "log")
