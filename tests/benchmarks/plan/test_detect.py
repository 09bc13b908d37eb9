"""Which profile a system's signs name."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from cpm_edge.benchmarks.plan.detect import (
    DEVICE_TREE,
    Signs,
    detect,
    match,
    memory,
    processor_name,
    read_signs,
)
from cpm_edge.benchmarks.plan.errors import PlanError
from cpm_edge.benchmarks.plan.this_machine import cache_file, this_machine

MEMINFO = "MemTotal:        7800000 kB\nMemFree: 1 kB\nMemAvailable:    5850000 kB\n"


def system(root: Path, files: dict[str, bytes]) -> Path:
    for name, content in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
    return root


@pytest.mark.parametrize(
    ("boards", "chip"),
    [
        ("nvidia,p3768-0000+p3767-0005\0nvidia,p3767-0005\0nvidia,tegra234\0", "jetson-orin-nano-8gb"),
        ("nvidia,p3768-0000+p3767-0005-super\0nvidia,p3767-0005\0", "jetson-orin-nano-8gb-super"),
        ("nvidia,p3768-0000+p3767-0000-super\0nvidia,tegra234\0", "jetson-orin-nx-16gb"),
        ("nvidia,p3737-0000+p3701-0005\0nvidia,p3701-0005\0", "jetson-agx-orin-64gb"),
        ("nvidia,p4071-0000+p3834-0008\0nvidia,tegra264\0", "jetson-thor-t5000"),
    ],
)
def test_a_jetson_is_known_by_its_device_tree(tmp_path: Path, boards: str, chip: str) -> None:
    root = system(
        tmp_path,
        {
            "etc/nv_tegra_release": b"# R36 (release), REVISION: 4.3",
            "proc/device-tree/compatible": boards.encode(),
            "proc/meminfo": MEMINFO.encode(),
        },
    )
    found = detect(root)
    assert found.id == chip
    assert found.memory is not None and found.memory.value == 7_800_000 * 1024
    assert found.reserved.value == 0.25


def test_where_the_system_does_not_name_the_processor_openvino_does(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    openvino = pytest.importorskip("openvino")

    class Core:
        def get_property(self, device: str, name: str) -> str:
            assert (device, name) == ("CPU", "FULL_DEVICE_NAME")
            return "Intel(R) Core(TM) Ultra 7 258V "

    monkeypatch.setattr("platform.processor", lambda: "")
    monkeypatch.setattr(openvino, "Core", Core)
    root = system(tmp_path, {"proc/cpuinfo": b"flags: none\n"})
    assert processor_name(root) == "Intel(R) Core(TM) Ultra 7 258V"


@pytest.mark.parametrize(
    ("signs", "chip"),
    [
        (Signs(processor="Intel(R) Core(TM) Ultra 7 258V"), "core-ultra-7-258v"),
        (Signs(processor="Intel(R) Core(TM) Ultra X7 358H"), "core-ultra-7-358h"),
        (Signs(processor="Intel(R) Core(TM) Ultra 7 155H", gpus=("NVIDIA GeForce RTX 4060 Laptop GPU",)),
         "rtx-4060-laptop"),
        (Signs(processor="AMD EPYC"), None),
        (Signs(boards=("nvidia,p3509-0000+p3668-0000",)), None),
    ],
)  # fmt: skip
def test_signs_name_a_chip(signs: Signs, chip: str | None) -> None:
    found = match(signs)
    assert (found.id if found else None) == chip


def test_an_unknown_machine_is_measured_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CPM_EDGE_CACHE", str(tmp_path))
    signs = Signs(processor="Some CPU", memory=16 << 30, available=12 << 30)
    calls = []

    def measure() -> tuple[float, float]:
        calls.append(1)
        return 5e10, 2e11

    first, second = this_machine(signs, measure=measure), this_machine(signs, measure=measure)
    assert first == second and len(calls) == 1
    assert first.id == "this-machine" and first.reserved.value == 0.25
    known = first.devices["CPU"].roofline
    assert first.bandwidth is not None and first.bandwidth.value == 5e10
    assert known is not None and known.bandwidth == pytest.approx(0.85 * 5e10)


def test_a_damaged_profile_of_this_machine_is_measured_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CPM_EDGE_CACHE", str(tmp_path))
    signs = Signs(processor="Some CPU")
    cache_file(signs).write_text(json.dumps({"schema": 1}))
    assert this_machine(signs, measure=lambda: (1e10, 1e11)).bandwidth is not None
    assert json.loads(cache_file(signs).read_text())["bandwidth"]["value"] == 1e10


def test_a_system_that_tells_nothing(tmp_path: Path) -> None:
    assert memory(tmp_path) == (None, None)
    assert read_signs(tmp_path).boards == ()


def test_a_jetson_that_no_profile_names_is_not_measured_on_its_cpu(tmp_path: Path) -> None:
    tree = tmp_path / DEVICE_TREE
    tree.parent.mkdir(parents=True)
    tree.write_bytes(b"nvidia,p9999-0000\0nvidia,tegra999\0")
    with pytest.raises(PlanError, match="expected a Jetson that a profile names, got nvidia,p9999-0000"):
        detect(tmp_path)
