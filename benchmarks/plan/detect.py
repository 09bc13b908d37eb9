"""Which chip this machine has: Jetson by its device tree, GPUs by nvidia-smi, else by the processor's name,
which OpenVINO tells where the system does not."""

from __future__ import annotations

import platform
import subprocess
import sys
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path

from cpm_edge.benchmarks.plan.catalog import chips
from cpm_edge.benchmarks.plan.chip import Chip, Number
from cpm_edge.benchmarks.plan.errors import PlanError

DEVICE_TREE = "proc/device-tree/compatible"
L4T_RELEASE = "etc/nv_tegra_release"


@dataclass(frozen=True)
class Signs:
    """What a system tells about itself.

    Attributes:
        boards: compatible strings of the device tree, on Jetson only.
        processor: brand string.
        gpus: names by nvidia-smi.
        memory, available: bytes, None where the system does not tell.
    """

    boards: tuple[str, ...] = ()
    processor: str = ""
    gpus: tuple[str, ...] = ()
    memory: int | None = None
    available: int | None = None


def read_signs(root: Path = Path("/")) -> Signs:
    """Of this machine; ``root`` is where its files are."""
    boards: tuple[str, ...] = ()
    if (root / L4T_RELEASE).exists() or (root / DEVICE_TREE).exists():
        data = _bytes(root / DEVICE_TREE)
        boards = tuple(part.decode("ascii", "replace") for part in data.split(b"\0") if part)
    total, available = memory(root)
    return Signs(boards, processor_name(root), () if boards else _gpus(), total, available)


def match(signs: Signs) -> Chip | None:
    """The profile that these signs name; the longest sign wins."""
    found: list[tuple[int, Chip]] = []
    for each in chips().values():
        for key, seen in (("device_tree", signs.boards), ("nvidia_smi", signs.gpus)):
            found += [(len(sign), each) for sign in each.detect.get(key, ()) if _names(sign, seen)]
    if not found:
        found = [
            (len(sign), each)
            for each in chips().values()
            for sign in each.detect.get("cpu_name", ())
            if sign in signs.processor
        ]
    return max(found, key=lambda pair: pair[0])[1] if found else None


def detect(root: Path = Path("/"), *, nvidia: bool = True) -> Chip:
    """The chip of this machine with its real memory; ``this-machine``, measured once, where none is known.

    Args:
        nvidia: whether a GPU that nvidia-smi names counts; it does not for engines that cannot use it.

    Raises:
        PlanError: a Jetson that no profile names; what is measured on a CPU would not be its GPU's.
    """
    signs = read_signs(root)
    chip = match(signs if nvidia else replace(signs, gpus=()))
    if chip is None and signs.boards:
        raise PlanError(
            f"--chip auto: expected a Jetson that a profile names, got {', '.join(signs.boards)}",
            hint="pass --chip; cpm-bench chips lists the ids",
        )
    if chip is None:
        from cpm_edge.benchmarks.plan.this_machine import this_machine

        return this_machine(signs)
    return chip if chip.kind == "rtx" else with_memory(chip, signs)


def with_memory(chip: Chip, signs: Signs) -> Chip:
    """The chip with what the system says of its memory; what others use now counts as reserved."""
    if not signs.memory or not signs.available:
        return chip
    used = min(0.9, max(0.01, 1 - signs.available / signs.memory))
    return replace(
        chip,
        memory=Number(signs.memory, "this system's total"),
        reserved=Number(round(used, 3), "in use on this system now"),
    )


def _names(sign: str, seen: Iterable[str]) -> bool:
    return any(
        name == sign or name.endswith((f",{sign}", f"+{sign}", f" {sign}", f" {sign} GPU")) for name in seen
    )


def processor_name(root: Path = Path("/")) -> str:
    """The brand string, empty where the system does not tell."""
    if sys.platform == "win32":
        return _windows_processor()
    for line in _bytes(root / "proc/cpuinfo").decode("utf-8", "replace").splitlines():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.processor() or _openvino_processor()


def _openvino_processor() -> str:
    """OpenVINO's name of the CPU, which it asks the CPU itself; empty without OpenVINO."""
    try:
        import openvino

        return str(openvino.Core().get_property("CPU", "FULL_DEVICE_NAME")).strip()
    except (ImportError, RuntimeError):
        return ""


def _windows_processor() -> str:
    import winreg

    place = r"HARDWARE\DESCRIPTION\System\CentralProcessor\0"
    try:
        with winreg.OpenKey(winreg.HKEY_LOCAL_MACHINE, place) as key:  # type: ignore[attr-defined,unused-ignore]
            return str(winreg.QueryValueEx(key, "ProcessorNameString")[0])  # type: ignore[attr-defined,unused-ignore]
    except OSError:
        return ""


def memory(root: Path = Path("/")) -> tuple[int | None, int | None]:
    """(total, available) bytes; None where the system does not tell."""
    fields = {}
    for line in _bytes(root / "proc/meminfo").decode("ascii", "replace").splitlines():
        name, _, rest = line.partition(":")
        fields[name] = int(rest.split()[0]) * 1024 if rest.split()[:1] and rest.split()[0].isdigit() else 0
    return fields.get("MemTotal") or None, fields.get("MemAvailable") or None


def _gpus() -> tuple[str, ...]:
    command = ["nvidia-smi", "--query-gpu=name", "--format=csv,noheader"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=5, check=True)
    except (OSError, subprocess.SubprocessError):
        return ()
    return tuple(line.strip() for line in done.stdout.splitlines() if line.strip())


def _bytes(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError:
        return b""
