"""``index.json`` beside the cubins: everything that a launcher without Python must know of each.

Keys of the file: ``format_version`` (1), ``sm``, ``jetpack`` (null: a card), ``triton``, ``ptxas``, ``ptx``
and ``kernels``, in the order that they were asked for. A kernel has ``name``, ``file``, ``bytes`` and
``sha256``; ``entry``, the symbol;
``parameters`` in order (``name``, ``type``, ``aligned``: a multiple of 16); ``grid``, three axes, each a
product of ceil(parameter / divisor); ``threads`` and ``warps`` of a block; ``stages`` of its loads;
``shared_bytes``, all dynamic; ``scratch_bytes`` in global memory; ``registers`` and ``stack_bytes`` (spills)
a thread; and ``constants``, the tile it was compiled for. After the parameters every kernel takes two 64-bit
pointers to scratch memory that is not used here: 0.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from cpm_edge.exporter.cubins.occupancy import WARP, occupancy
from cpm_edge.exporter.cubins.toolchain import Toolchain
from cpm_edge.plugins.kernel_config import KernelConfig

FORMAT_VERSION = 1
FILE = "index.json"


@dataclass(frozen=True)
class Cubin:
    """One compiled kernel; attributes as in the file."""

    config: KernelConfig
    entry: str
    bytes: int
    sha256: str
    shared_bytes: int
    registers: int
    stack_bytes: int

    @classmethod
    def of(cls, config: KernelConfig, path: Path, found: dict[str, Any]) -> Cubin:
        """From a cubin's file and what the compiler says about it."""
        data = path.read_bytes()
        digest = hashlib.sha256(data).hexdigest()
        usage = {name: found[name] for name in ("entry", "shared_bytes", "registers", "stack_bytes")}
        return cls(config, bytes=len(data), sha256=digest, **usage)

    def to_json(self) -> dict[str, Any]:
        config = self.config.to_json()
        return {
            "name": self.config.name,
            "file": f"{self.config.name}.cubin",
            "bytes": self.bytes,
            "sha256": self.sha256,
            "entry": self.entry,
            "parameters": config["parameters"],
            "grid": config["grid"],
            "threads": WARP * self.config.warps,
            "warps": self.config.warps,
            "stages": self.config.stages,
            "shared_bytes": self.shared_bytes,
            "scratch_bytes": 0,
            "registers": self.registers,
            "stack_bytes": self.stack_bytes,
            "constants": config["constants"],
        }

    def occupancy(self, sm: int) -> float:
        """The share of a multiprocessor's warps that are resident, 0 to 1, in theory."""
        usage = {"warps": self.config.warps, "registers": self.registers, "shared_bytes": self.shared_bytes}
        return occupancy(sm, **usage)


@dataclass(frozen=True)
class Index:
    """All cubins of a folder, and what made them."""

    toolchain: Toolchain
    triton: str
    ptx: str
    cubins: list[Cubin]

    def to_json(self) -> dict[str, Any]:
        platform = asdict(self.toolchain.platform)
        return {
            "format_version": FORMAT_VERSION,
            "sm": platform["sm"],
            "jetpack": platform["jetpack"],
            "triton": self.triton,
            "ptxas": self.toolchain.version,
            "ptx": self.ptx,
            "kernels": [each.to_json() for each in self.cubins],
        }

    def write(self, folder: Path) -> None:
        """Write ``index.json``."""
        text = json.dumps(self.to_json(), indent=1) + "\n"
        (folder / FILE).write_text(text, encoding="utf-8")
