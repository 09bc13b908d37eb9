"""Our launches against those of Triton's own launcher, on the same stub of a driver."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import sysconfig
from pathlib import Path
from typing import Any

import pytest

from cpm_edge.exporter.cubins.toolchain import find_toolchain
from cpm_edge.plugins.launch_plan import Launch
from tests.plugins.tensorrt.cases import CASES, Case
from tests.plugins.tensorrt.harness import Device, arguments_of, enqueue, words

PROCESS = Path(__file__).parent / "triton_process.py"


def test_launches_equal_those_of_triton(device: Device, tmp_path: Path) -> None:
    if not Path(sysconfig.get_paths()["include"], "Python.h").exists():
        pytest.skip("Triton compiles its launcher with Python.h: apt-get install python3-dev")
    chosen = _one_launch_a_function()
    ours = []
    for case, rows, launch in chosen:
        change, run = words("change", case.tensors(rows)), enqueue(case, rows, stream=0)
        device.run(device.create(case), change, run)
        ours.append(device.calls()[case.plan.variant(rows).launches.index(launch)])
    assert {launch["kernel"] for launch in ours} == {launch.kernel.function for *_, launch in chosen}
    assert ours == _triton_launches(device, tmp_path, chosen)


def _one_launch_a_function() -> list[tuple[Case, int, Launch]]:
    """Of every kernel that any case launches."""
    found: dict[tuple[str, str], tuple[Case, int, Launch]] = {}
    for case in CASES:
        for rows in case.limits():
            for launch in case.plan.variant(rows).launches:
                found.setdefault((launch.kernel.module, launch.kernel.function), (case, rows, launch))
    return list(found.values())


def _triton_launches(
    device: Device, folder: Path, chosen: list[tuple[Case, int, Launch]]
) -> list[dict[str, Any]]:
    """The same launches by Triton, from kernels that it compiles itself."""
    request = [
        {
            "config": launch.kernel.to_json(),
            "grid": launch.grid(rows),
            "arguments": arguments_of(case, launch, rows),
        }
        for case, rows, launch in chosen
    ]
    toolchain = find_toolchain(87)
    device.record.write_text("")
    settings = {
        "CPM_STUB_RECORD": str(device.record),
        "TRITON_LIBCUDA_PATH": str(device.tools.driver.parent),
        "LD_LIBRARY_PATH": str(device.tools.driver.parent),
        "TRITON_CACHE_DIR": str(folder / "cache"),
        "TRITON_DEFAULT_FP_FUSION": "1",
        "TRITON_DISABLE_LINE_INFO": "1",
        "TRITON_PTXAS_PATH": str(toolchain.ptxas),
    }
    done = subprocess.run(
        [sys.executable, PROCESS, str(toolchain.platform.ptxas.ptx)],
        input=json.dumps(request),
        capture_output=True,
        text=True,
        env=os.environ | settings,
    )
    assert done.returncode == 0, done.stderr
    return device.calls()
