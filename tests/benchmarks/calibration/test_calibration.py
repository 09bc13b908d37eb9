"""``cpm-bench calibration`` on a tiny checkpoint, with a stand-in for NNCF."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from click.testing import CliRunner, Result

from cpm_edge.benchmarks.cli import main

if TYPE_CHECKING:
    from tests.support.bundles import Bundles

# Leaves the weights alone, and says what it was asked for.
STAND_IN = """
import json, os
__version__ = "9.9"
class CompressWeightsMode: INT4_SYM = "int4_sym"
class BackupMode: NONE = "none"
class Dataset(list): pass
def compress_weights(model, **options):
    with open(os.environ["ASKED"], "a") as file:
        rows = [{name: value.shape for name, value in row.items()} for row in options.pop("dataset", [])]
        file.write(json.dumps({**options, "rows": rows}) + "\\n")
    return model
"""
TEXT = "The quick brown fox jumps over the lazy dog, and the dog does not mind at all. " * 40


def bench(bundles: Bundles, folder: Path, *options: str) -> Result:
    text = folder / "text.txt"
    text.write_text(TEXT)
    model = str(bundles.checkpoint("llama"))
    arguments = ["calibration", "--model", model, "--text", str(text), "--dataset", str(text)]
    arguments += ["--characters", "0", "2000", "--window", "40", "--windows", "2"]
    return CliRunner().invoke(main, [*arguments, "--calibration-tokens", "96", *options])


def test_methods_nncf_and_others_are_rows_of_one_table(
    bundles: Bundles, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "nncf.py").write_text(STAND_IN)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    monkeypatch.setenv("ASKED", str(tmp_path / "asked"))
    same = str(bundles.checkpoint("llama"))
    asked = ["--method", "rtn", "--method", "gptq", "--group-size", "32", "--nncf-python", sys.executable]
    done = bench(bundles, tmp_path, *asked, "--other", same, "--json", str(tmp_path / "out.json"))
    assert done.exit_code == 0, done.output
    report = json.loads((tmp_path / "out.json").read_text())
    rows = report["results"]["rows"]
    data = "awq + scale_estimation + gptq"
    names = [
        "rtn, int4 g32 sym",
        "gptq, int4 g32 sym",
        *(f"NNCF, int4 g32 sym, {how}" for how in ("no data", data)),
    ]
    assert list(rows) == [*names, Path(same).name]
    assert report["versions"]["nncf"] == "9.9"
    rounded, calibrated, plain, _, other = rows.values()
    assert 0 < calibrated["kl"] < rounded["kl"] and rounded["bits"] == calibrated["bits"] == 4.5
    # What nothing was rounded in: both engines compute the checkpoint.
    for row in (plain, other):
        assert row["kl"] < 1e-6 and row["top1"] == 1
        assert row["perplexity"] == pytest.approx(report["results"]["reference_perplexity"], rel=1e-4)
    first, second = map(json.loads, (tmp_path / "asked").read_text().splitlines())
    assert first == {"mode": "int4_sym", "group_size": 32, "ratio": 1.0, "backup_mode": "none", "rows": []}
    assert second.pop("rows")[0]["input_ids"] == [1, 96]
    del first["rows"]
    assert second == first | {"subset_size": 1, "awq": True, "scale_estimation": True, "gptq": True}


def test_a_python_without_nncf_is_one_clear_error(bundles: Bundles, tmp_path: Path) -> None:
    done = bench(bundles, tmp_path, "--method", "rtn", "--group-size", "32", "--nncf-python", sys.executable)
    assert done.exit_code == 1
    assert (
        "No module named 'nncf'" in done.output
        and "hint: --nncf-python takes the Python of a venv" in done.output
    )


def test_a_text_that_is_too_short_is_refused(bundles: Bundles, tmp_path: Path) -> None:
    done = bench(bundles, tmp_path, "--method", "rtn", "--characters", "0", "9")
    assert done.exit_code == 1 and "--text: expected 40 tokens or more in characters 0 to 9" in done.output
