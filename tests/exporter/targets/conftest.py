from __future__ import annotations

import shutil
from collections.abc import Iterator, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import pytest

from cpm_edge.exporter.cubins.compile import compile_cubins
from cpm_edge.plugins.kernel_config import KernelConfig
from tests.support.bundles import Bundles


@pytest.fixture(scope="session")
def engines(bundles: Bundles, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Bundles]:
    """Exports for jetson and rtx; equal sets of kernels are compiled once."""

    @cache
    def compiled(configs: tuple[str, ...], sm: int) -> Path:
        folder = tmp_path_factory.mktemp("cubins")
        compile_cubins(folder, sm, [known[name] for name in configs])
        return folder

    known: dict[str, KernelConfig] = {}

    def copied(folder: Path, sm: int, configs: Sequence[KernelConfig]) -> None:
        known.update({each.name: each for each in configs})
        shutil.copytree(compiled(tuple(each.name for each in configs), sm), folder, dirs_exist_ok=True)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("cpm_edge.exporter.targets.engine_native.compile_cubins", copied)
        yield bundles


CHIP = "jetson-orin-nano-8gb"
# Options of an export by flavour; the rest is what Bundles takes by default.
FORMS: dict[str, dict[str, Any]] = {
    "stock": {"target": "rtx", "activations": None},
    "native": {"target": "jetson", "activations": None, "flavour": "native", "chip": CHIP},
}
