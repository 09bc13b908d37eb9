from __future__ import annotations

import signal
from collections.abc import Iterator
from typing import TYPE_CHECKING

import hypothesis
import numpy as np
import pytest

if TYPE_CHECKING:
    from tests.support.bundles import Bundles


# How long an example takes says more of the machine than of the code.
hypothesis.settings.register_profile("untimed", deadline=None)
hypothesis.settings.load_profile("untimed")

# In the background of a shell (nohup make test &) SIGINT is ignored, and children would inherit that.
signal.signal(signal.SIGINT, signal.default_int_handler)

TORCH_TABLE = "torch.onnx._internal.exporter._registration.ONNXRegistry"


@pytest.fixture(scope="session")
def bundles(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Bundles]:
    """Tiny checkpoints and their exports, shared by all tests."""
    from tests.support.bundles import Bundles, torch_functions_once, trace_once

    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("CPM_EDGE_CACHE", str(tmp_path_factory.mktemp("user-cache")))
        patch.setattr("cpm_edge.exporter.trace.trace", trace_once())
        patch.setattr(f"{TORCH_TABLE}.from_torchlib", torch_functions_once())
        yield Bundles(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(autouse=True, scope="session")
def no_lines_by_the_minute() -> Iterator[None]:
    """Commands that run in this process would print where they are, by the age of the process."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("cpm_edge.exporter.progress.LINE_SECONDS", float("inf"))
        yield


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_makereport(item: pytest.Item) -> None:
    """Make numpy's numbers among recorded properties Python's: others cannot be sent between processes."""
    item.user_properties[:] = [
        (name, value.item() if isinstance(value, np.generic) else value)
        for name, value in item.user_properties
    ]


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Say what the comparisons with the sparse reference left out, and what they took in."""
    names = ("exact_ties_included", "near_ties_excluded")
    totals = dict.fromkeys(names, 0)
    for report in terminalreporter.getreports("passed"):
        for name, value in report.user_properties:
            if name in totals:
                totals[name] += int(str(value))
    if any(totals.values()):
        included, excluded = totals.values()
        terminalreporter.write_line(
            f"block selection: {included} exact ties compared, {excluded} rows left out as near-ties"
        )
