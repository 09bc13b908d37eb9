"""The command line in a process of its own against the export in this one: the same bytes."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from cpm_edge.runtimes.bundle import open_bundle
from tests.support.bundles import Bundles


@pytest.mark.parametrize(("variant", "target"), [("llama", "ort"), ("sparse", "aipc")])
def test_two_exports_have_the_same_bytes(bundles: Bundles, variant: str, target: str, tmp_path: Path) -> None:
    here = bundles.open(variant, target, weight_format="int4").manifest
    model = str(bundles.checkpoint(variant))
    command = [sys.executable, "-m", "cpm_edge.exporter.cli", "--model", model, "--target", target]
    command += ["--weight-format", "int4", "--activations", "fp32", "--json", "-o", str(tmp_path / "out")]
    environment = {**os.environ, "PYTHONHASHSEED": "12345"}
    done = subprocess.run(command, capture_output=True, text=True, check=True, env=environment)
    there = open_bundle(tmp_path / "out").manifest
    assert {name: entry.sha256 for name, entry in here.files.items()} == {
        name: entry.sha256 for name, entry in there.files.items()
    }
    assert here.source == there.source

    # The verification ran, in a child of the child, and is part of the manifest.
    report = json.loads(done.stdout)["verification"]
    assert report == there.verification and here.verification is None
    assert report["passed"] and report["cosine"] > 0.999 and report["first_diverging_layer"] is None
