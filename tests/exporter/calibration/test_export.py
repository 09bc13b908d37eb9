"""Calibration as a part of an export: what the bundle, the manifest and the folder beside it hold."""

from __future__ import annotations

import json
from dataclasses import replace
from unittest.mock import patch

import pytest
from click.testing import CliRunner

from cpm_edge.exporter import trace
from cpm_edge.exporter.cli import main
from cpm_edge.exporter.errors import ExportError
from cpm_edge.exporter.export import export
from cpm_edge.exporter.progress import Progress
from cpm_edge.runtimes.bundle import hash_files
from cpm_edge.runtimes.errors import BundleError
from tests.exporter.calibration.conftest import Bench
from tests.support.bundles import trace_once


def test_the_same_export_twice_and_from_the_saved_checkpoint(bench: Bench) -> None:
    root = bench.root / "exports"
    options = bench.options("tied-mha", method="gptq+awq", output=root / "a", verify=True)
    with patch.object(trace, "trace", trace_once()):
        first = export(replace(options, save_checkpoint=root / "saved"), Progress(enabled=False))
        again = export(replace(options, output=root / "b", verify=False), Progress(enabled=False))
        saved = replace(
            options.after_calibration(), model=str(root / "saved"), output=root / "c", verify=False
        )
        third = export(saved, Progress(enabled=False))
    assert {path.name for path in root.iterdir()} == {"a", "b", "c", "saved"}
    weights = ("model.onnx", "model.onnx.data")
    assert [hash_files(first.folder)[name] for name in weights] == [
        hash_files(again.folder)[name] for name in weights
    ]
    assert first.manifest.weights == again.manifest.weights
    assert third.manifest.weights["linear_bytes"] == first.manifest.weights["linear_bytes"]
    assert third.manifest.weights["taken_from"] == {"GPTQ": 14}
    about = first.manifest.weights["calibration"]
    assert (about["method"], about["tokens"], about["seed"], about["dataset"]) == (
        "gptq+awq",
        512,
        0,
        "default",
    )
    assert "int4 g32 sym by gptq+awq on 512 tokens" in (first.folder / "README.md").read_text()
    report = first.manifest.verification
    assert report is not None
    assert report["passed"]
    # Scales have moved into norms, and the comparison is with the checkpoint as it came.
    assert 0 < report["against_checkpoint"]["kl"] < 1


def test_a_folder_for_the_checkpoint_that_exists_is_refused_before_any_work(bench: Bench) -> None:
    taken = bench.root / "taken"
    taken.mkdir()
    (taken / "file").touch()
    with pytest.raises(BundleError, match="exists already"):
        export(bench.options("tied-mha", save_checkpoint=taken), Progress(enabled=False))


def test_sequences_no_longer_than_the_skipped_positions(bench: Bench) -> None:
    with pytest.raises(ExportError, match="expected fewer than the 4 tokens of a text, got 4"):
        bench.calibrate(bench.root / "short", "tied-mha", max_context=4, skip_positions=4)


def test_a_place_that_cannot_be_written_is_refused_before_any_work(bench: Bench) -> None:
    file = bench.root / "file"
    file.touch()
    with pytest.raises(ExportError, match=r"--save-checkpoint .*file is no folder that can be written"):
        export(bench.options("tied-mha", save_checkpoint=file / "saved"), Progress(enabled=False))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--damping", "0.1"], "--damping: expected together with --method gptq or"),
        (["--method", "awq", "--no-act-order"], "--no-act-order: expected together with --method gptq or"),
        (["--skip-positions", "4"], "--skip-positions: expected together with --method other"),
        (["--calibration-tokens", "64"], "--calibration-tokens: expected together with --method other"),
        (["--ratio", "0"], "0.0 is not in the range 0<x<=1"),
        (["--ratio", "nan"], "nan is not in the range 0<x<=1"),
        (["--method", "gptq", "--damping", "nan"], "nan is not in the range 0<x<=1"),
        (["--method", "gptq", "--save-checkpoint", "out/sub"], "none inside the other"),
        (["--method", "gptq", "--save-checkpoint", "."], "none inside the other"),
        (["--dataset", "text.txt"], "--dataset: expected together with --method"),
        (
            ["--method", "gptq", "--save-checkpoint", "out"],
            "--save-checkpoint: expected another folder than -o",
        ),
    ],
)
def test_options_that_do_not_go_together(options: list[str], message: str) -> None:
    result = CliRunner().invoke(main, ["--model", "m", "--target", "ort", "-o", "out", *options])
    assert result.exit_code == 2 and message in result.stderr


def test_the_command_line(bench: Bench) -> None:
    output = bench.root / "cli"
    arguments = [
        "--model",
        str(bench.checkpoint("tied-mha")),
        "--target",
        "ort",
        "-o",
        str(output),
        "--no-verify",
    ]
    asked = ["--method", "gptq", "--calibration-tokens", "128", "--ratio", "0.3", "--skip-positions", "4"]
    result = CliRunner().invoke(main, [*arguments, *asked, "--json"])
    assert result.exit_code == 0, result.output
    report = json.loads(result.stdout)
    assert report["weights"]["calibration"]["skipped"] == 4
    assert 0 < report["seconds"]["a layer"] < report["seconds"]["calibrate"]
    kept = [row["name"] for row in report["sensitivities"] if row["kept"]]
    assert kept
    assert kept == report["weights"]["calibration"]["int8"]
    # Most weights are int8 now, and the others still have their calibrated integers.
    assert report["weights"]["linear"] == "int8 row sym"
    assert set(report["weights"]["other_groups"].values()) == {"int4 g32 sym"}
    result = CliRunner().invoke(main, [*arguments, *asked, "--overwrite"])
    assert result.exit_code == 0, result.output
    assert "int8 row sym, others int4 by gptq on 128 tokens" in result.stderr
    assert "Mixed precision" in result.stderr
    assert "output error at int4" in result.stderr
