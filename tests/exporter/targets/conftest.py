from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

from cpm_edge.plugins.kernel_config import KernelConfig
from tests.support.bundles import Bundles

CONFIGURATIONS = "plugins/kernels/configurations.json"
CHIP = "jetson-orin-nano-8gb"
# Options of an export by flavour; the rest is what Bundles takes by default.
FORMS: dict[str, dict[str, Any]] = {
    "stock": {"target": "rtx", "activations": None},
    "native": {"target": "jetson", "activations": None, "flavour": "native", "chip": CHIP},
}


@pytest.fixture(scope="session")
def engines(bundles: Bundles) -> Iterator[Bundles]:
    """Exports for jetson and rtx with configurations in place of kernels, on which no graph depends."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("cpm_edge.exporter.targets.engine_native.compile_cubins", _write_configurations)
        yield bundles


def _write_configurations(folder: Path, sm: int, configs: Sequence[KernelConfig]) -> None:
    (folder / Path(CONFIGURATIONS).name).write_text(json.dumps([each.to_json() for each in configs]))
