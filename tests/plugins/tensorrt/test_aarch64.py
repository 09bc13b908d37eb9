"""The library of a Jetson's machine, run by an emulator: the same launches, and errors come through."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.plugins.tensorrt.cases import CASES
from tests.plugins.tensorrt.conftest import make_device
from tests.plugins.tensorrt.harness import (
    OUTPUTS,
    Device,
    build_tools,
    enqueue,
    expected_launches,
    require,
    require_library,
    words,
)

COMPILER = "aarch64-linux-gnu-g++"


@pytest.fixture(scope="module")
def jetson(kernels: Path, tmp_path_factory: pytest.TempPathFactory) -> Device:
    require_library("aarch64")
    require("qemu-aarch64", "qemu-user")
    emulator = ("qemu-aarch64", "-L", "/usr/aarch64-linux-gnu")
    folder = tmp_path_factory.mktemp("aarch64")
    return make_device(build_tools(folder, COMPILER, emulator), "aarch64", kernels, folder)


def test_aarch64(jetson: Device, kernels: Path) -> None:
    sparse = CASES[3]
    commands = [
        each for rows in (1, 37) for each in (words("change", sparse.tensors(rows)), enqueue(sparse, rows))
    ]
    moved = enqueue(sparse, 37, output1=OUTPUTS)
    answers = jetson.run(jetson.create(sparse), "clone", "serialize", "attach", *commands, moved)
    assert {each.text for each in answers[4:-1]} == {"0"}
    assert not any(each.errors for each in answers[:-1])
    assert "present_key: expected the address of key_cache" in answers[-1].errors[0]
    expected = [launch for rows in (1, 37) for launch in expected_launches(sparse, rows, kernels)]
    assert jetson.calls() == expected
