from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from tests.bad_input.bench import Bench
from tests.support.bundles import Bundles


@pytest.fixture
def bench(bundles: Bundles, tmp_path: Path) -> Bench:
    """A tiny Llama checkpoint of the test's own."""
    return Bench(tmp_path, shutil.copytree(bundles.checkpoint("llama"), tmp_path / "checkpoint"))


@pytest.fixture
def bundle(bundles: Bundles, tmp_path: Path) -> Path:
    """An ort bundle of the test's own, with a context of 64 tokens."""
    made = bundles.result("llama", "ort", weight_format="int4", max_context=64).folder
    return shutil.copytree(made, tmp_path / "bundle")
