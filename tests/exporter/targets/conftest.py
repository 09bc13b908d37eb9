from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

from tests.support.bundles import Bundles

CHIP = "jetson-orin-nano-8gb"
# Options of an export by flavour; the rest is what Bundles takes by default.
FORMS: dict[str, dict[str, Any]] = {
    "stock": {"target": "rtx", "activations": None},
    "native": {"target": "jetson", "activations": None, "flavour": "native", "chip": CHIP},
}


@pytest.fixture(scope="session")
def engines(bundles: Bundles) -> Iterator[Bundles]:
    """Exports for jetson and rtx without kernels: no graph depends on what they are compiled to."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("cpm_edge.exporter.targets.engine_native.compile_cubins", lambda *_: None)
        yield bundles
