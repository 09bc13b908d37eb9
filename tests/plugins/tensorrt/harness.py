"""The C++ programs of ``csrc``: a stub of the CUDA driver, and what drives plugins as TensorRT does."""

from __future__ import annotations

import json
import platform
import shlex
import shutil
import struct
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

from cpm_edge.plugins.launch_plan import ROWS, Argument, Buffer, Launch
from tests.plugins.tensorrt.cases import Case, Tensor

SOURCES = Path(__file__).parent / "csrc"
# Device memory of a node: inputs, outputs of their own and workspace each have a gigabyte.
INPUTS, OUTPUTS, WORKSPACE, STREAM = 0x7E00_0000_0000, 0x7F00_0000_0000, 0x7D00_0000_0000, 0x1230
GIGABYTE = 1 << 30

Fields = Mapping[str, int | str | None]


@dataclass(frozen=True)
class Tools:
    """Built programs of one machine; ``emulator`` is what starts a program here."""

    harness: Path
    driver: Path
    emulator: tuple[str, ...] = ()


@dataclass(frozen=True)
class Answer:
    """What the harness says to a command, and what the library logged meanwhile."""

    text: str
    errors: list[str]


def require(command: str, package: str) -> None:
    """Skip without a command that CI installs."""
    if shutil.which(command) is None:
        pytest.skip(f"{command} is not installed: apt-get install {package}")


def require_library(machine: str) -> None:
    """Skip without what the plugin library of a machine is built with, which CI installs."""
    native = machine == platform.machine()
    if machine == "x86_64" and not native:
        pytest.skip("the library for x86-64 is built on such machines only")
    require("g++" if native else f"{machine}-linux-gnu-g++", "g++ g++-aarch64-linux-gnu")
    if not Path("/usr/include/nlohmann/json.hpp").exists():
        pytest.skip("nlohmann/json is not installed: apt-get install nlohmann-json3-dev")


def build_tools(folder: Path, compiler: str, emulator: tuple[str, ...] = ()) -> Tools:
    """Compile the programs with the headers that the plugins are built with."""
    packages = (("kernel_lens", "include/tensorrt"), ("triton", "backends/nvidia/include"))
    headers = []
    for name, inside in packages:
        spec = find_spec(name)
        assert spec is not None and spec.origin is not None, f"{name}: a dependency of the tests"
        headers.append(f"-isystem{Path(spec.origin).parent / inside}")
    common = [compiler, "-std=c++17", "-O0", "-Wall", "-Wextra", "-Werror", *headers]
    tools = Tools(folder / "harness", folder / "libcuda.so.1", emulator)
    subprocess.run([*common, SOURCES / "harness.cpp", "-o", tools.harness, "-ldl"], check=True)
    subprocess.run([*common, "-fPIC", "-shared", SOURCES / "libcuda.cpp", "-o", tools.driver], check=True)
    return tools


@dataclass(frozen=True)
class Device:
    """A machine with a plugin library and kernels beside it, as in a bundle, and the stub of a driver."""

    tools: Tools
    library: Path
    record: Path

    def run(self, *commands: str, driver: bool = True, **settings: str | int) -> list[Answer]:
        """One answer each; settings are those of the stub, by their names without CPM_STUB_."""
        self.record.write_text("")
        environment = {f"CPM_STUB_{name.upper()}": str(value) for name, value in settings.items()}
        environment |= {"CPM_STUB_RECORD": str(self.record)}
        if driver:
            environment["LD_LIBRARY_PATH"] = str(self.tools.driver.parent)
        # An emulator gives the program its own environment; its libraries are not those of this machine.
        given = [part for name, value in environment.items() for part in ("-E", f"{name}={value}")]
        emulator = [*self.tools.emulator, *given] if self.tools.emulator else []
        done = subprocess.run(
            [*emulator, str(self.tools.harness), str(self.library)],
            input="".join(f"{each}\n" for each in commands),
            capture_output=True,
            text=True,
            env=None if emulator else environment,
        )
        assert done.returncode == 0, (done.returncode, done.stdout, done.stderr)
        assert not done.stderr
        return _answers(done.stdout, len(commands))

    def calls(self, kind: str = "launch") -> list[dict[str, Any]]:
        """What the driver was asked for during the last run."""
        lines = [json.loads(line) for line in self.record.read_text().splitlines()]
        return [line for line in lines if line.pop("call") == kind]

    def create(self, case: Case, text: str | None = None, changed: Fields | None = None) -> str:
        """The command that creates a node, with another text as plan, and without a field that is None."""
        path = self.record.parent / f"{case.name}.plan"
        path.write_text(case.plan.to_json() if text is None else text)
        fields: Fields = {"plan": f"s:{path}", **case.attributes, **(changed or {})}
        words = [
            f"{name}={f'i:{value}' if isinstance(value, int) else value}"
            for name, value in fields.items()
            if value is not None
        ]
        return " ".join(["create", case.op, f"layer.{case.name}", *words])


def _answers(text: str, expected: int) -> list[Answer]:
    found: list[Answer] = []
    errors: list[str] = []
    for line in text.splitlines():
        if line.startswith("error "):
            errors += shlex.split(line)[1:]
        else:
            found.append(Answer(line.removeprefix("= ").strip(), errors))
            errors = []
    assert len(found) == expected, text
    return found


def words(command: str, tensors: Sequence[Tensor]) -> str:
    """A command about tensors."""
    return " ".join([command, *(f"{type}:{'x'.join(map(str, shape))}" for type, shape in tensors)])


def addresses(case: Case, rows: int) -> tuple[list[int], list[int]]:
    """Of inputs and outputs; an output in place is at its input."""
    inputs = [INPUTS + index * GIGABYTE for index in range(len(case.tensors(rows)))]
    outputs = [
        OUTPUTS + index * GIGABYTE if alias < 0 else inputs[alias] for index, alias in enumerate(case.aliases)
    ]
    return inputs, outputs


def enqueue(case: Case, rows: int, workspace: int = WORKSPACE, stream: int = STREAM, **moved: int) -> str:
    """The command; ``output1=ADDRESS`` moves a buffer."""
    inputs, outputs = addresses(case, rows)
    for name, address in moved.items():
        (inputs if name.startswith("input") else outputs)[int(name[-1])] = address
    return " ".join(["enqueue", str(stream), str(workspace), *map(str, [*inputs, *outputs])])


def arguments_of(case: Case, launch: Launch, rows: int) -> list[int | float]:
    """Numbers and addresses in the kernel's order, without the pointers to scratch memory."""
    inputs, outputs = addresses(case, rows)
    offsets = case.plan.offsets(rows)

    def value(argument: Argument) -> int | float:
        if isinstance(argument, Buffer):
            if argument.kind == "workspace":
                return WORKSPACE + offsets[str(argument.key)]
            return (inputs if argument.kind == "input" else outputs)[int(argument.key)]
        return rows if argument == ROWS else float(argument) if isinstance(argument, float) else int(argument)

    return [value(launch.arguments[each.name]) for each in launch.kernel.parameters]


def expected_launches(case: Case, rows: int, folder: Path) -> list[dict[str, Any]]:
    """What the plan says, in the form of the record.

    Args:
        folder: of the cubins and their index.
    """
    kernels = {each["name"]: each for each in json.loads((folder / "index.json").read_text())["kernels"]}
    found = []
    for launch in case.plan.variant(rows).launches:
        kernel = kernels[launch.kernel.name]
        packed = [
            struct.pack("<Q" if each.type.startswith("*") else "<f" if each.type == "fp32" else "<i", value)
            for each, value in zip(launch.kernel.parameters, arguments_of(case, launch, rows), strict=True)
        ]
        found.append(
            {
                "kernel": launch.kernel.function,
                "module": fnv(folder / kernel["file"]),
                "grid": list(launch.grid(rows)),
                "block": [32 * launch.kernel.warps, 1, 1],
                "shared": kernel["shared_bytes"],
                "stream": STREAM,
                "arguments": [each.hex() for each in packed] + ["00" * 8] * 2,
            }
        )
    return found


def fnv(path: Path) -> str:
    """The stub's hash of a cubin: FNV-1a, 64 bits."""
    value = 14695981039346656037
    for byte in path.read_bytes():
        value = (value ^ byte) * 1099511628211 % (1 << 64)
    return f"{value:016x}"
