from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from tests.support.bundles import Bundles


@pytest.fixture(scope="session")
def bundles(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Bundles]:
    """Tiny checkpoints and their exports, shared by all tests."""
    from tests.support.bundles import Bundles, trace_once

    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("CPM_EDGE_CACHE", str(tmp_path_factory.mktemp("user-cache")))
        patch.setattr("cpm_edge.exporter.trace.trace", trace_once())
        yield Bundles(tmp_path_factory.mktemp("tiny"))
