"""The built libraries: what they need of a machine, and TensorRT's own registry with them."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

from cpm_edge.plugins import tensorrt_library
from cpm_edge.plugins.native import NativeError
from cpm_edge.plugins.tensorrt_library import MACHINES, NAMESPACE, PLUGIN_VERSION, library
from tests.plugins.tensorrt.cases import CASES
from tests.plugins.tensorrt.harness import Device, require, require_library

PROCESS = Path(__file__).parent / "registry_process.py"


@pytest.mark.parametrize("machine", MACHINES)
def test_what_a_library_needs(machine: str) -> None:
    """JetPack 6.2 has glibc 2.35 and the C++ library of GCC 12; TensorRT and CUDA come with the process."""
    require_library(machine)
    require("readelf", "binutils")
    path = library(machine)
    symbols = subprocess.run(
        ["readelf", "-W", "--dyn-syms", path], capture_output=True, text=True, check=True
    )
    rows = [line.split() for line in symbols.stdout.splitlines()]
    named = [(row[6], row[7]) for row in rows if len(row) > 7 and row[3] in ("FUNC", "OBJECT", "NOTYPE")]
    exported = {name for section, name in named if section not in ("UND", "ABS")}
    assert exported == {"getCreators", "setLoggerFinder"}
    foreign = [
        name for section, name in named if section == "UND" and re.match(r"cu[A-Z]|cuda|.*nvinfer", name)
    ]
    assert not foreign
    versions = {name.rpartition("@")[2] for section, name in named if section == "UND" and "@" in name}
    for kind, newest in (("GLIBC_", (2, 34)), ("GLIBCXX_", (3, 4, 30))):
        numbers = [tuple(map(int, each.removeprefix(kind).split("."))) for each in versions if kind in each]
        assert numbers, kind
        assert max(numbers) <= newest
    needed = subprocess.run(["readelf", "-d", path], capture_output=True, text=True, check=True).stdout
    libraries = set(re.findall(r"NEEDED.*\[(.*?)\.so", needed))
    assert libraries <= {"libc", "libm", "libstdc++", "libgcc_s", "libdl", "libpthread", "ld-linux-x86-64"}


def test_missing_libraries_say_how_to_get_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tensorrt_library, "__file__", str(tmp_path / "tensorrt_library.py"))
    with pytest.raises(NativeError, match=r"aarch64: expected .*, which was not built; apt-get install"):
        library("aarch64")
    with pytest.raises(NativeError, match="expected a machine of x86_64, aarch64, got riscv64"):
        library("riscv64")


@pytest.mark.skipif(find_spec("tensorrt_lean_bindings") is None, reason="tensorrt-lean has no wheel here")
def test_tensorrt_registry(device: Device) -> None:
    """In a process of its own, because TensorRT without a driver does not end well."""
    fields = [{"plan": case.plan.to_json(), **case.attributes} for case in CASES]
    common = {"version": PLUGIN_VERSION, "namespace": NAMESPACE}
    nodes = [
        {"op": case.op, "fields": each, **common}
        for case, each in zip([*CASES, CASES[0]], [*fields, fields[0] | {"plan": "{}"}], strict=True)
    ]
    done = subprocess.run(
        [sys.executable, PROCESS, device.library], input=json.dumps(nodes), capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["creators"] == {
        "CpmMatMulNBits": [PLUGIN_VERSION, NAMESPACE, ["plan", "bits", "group", "n", "k"]],
        "CpmSparseAttention": [PLUGIN_VERSION, NAMESPACE, ["plan", "topk"]],
        "CpmLinearAttention": [PLUGIN_VERSION, NAMESPACE, ["plan"]],
    }
    outputs = [[case.op, PLUGIN_VERSION, NAMESPACE, len(case.types)] for case in CASES]
    assert found["plugins"] == [*outputs, None]
    assert "CpmMatMulNBits layer: plan: " in done.stderr or "CpmMatMulNBits: plan: " in done.stderr
