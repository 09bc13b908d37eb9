"""From tile configurations to cubins and their index, without a GPU; two runs give the same bytes."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from cpm_edge.exporter.cubins.index import Cubin, Index
from cpm_edge.exporter.cubins.toolchain import Toolchain, find_toolchain
from cpm_edge.exporter.disk import disk_errors
from cpm_edge.exporter.errors import ExportError
from cpm_edge.plugins.kernel_config import KernelConfig
from cpm_edge.plugins.linear_attention import launches as linear_attention
from cpm_edge.plugins.matmul_nbits import launches as matmul_nbits
from cpm_edge.plugins.sparse_attention import launches as sparse_attention
from cpm_edge.runtimes.errors import missing_dependency

WORKER = "cpm_edge.exporter.cubins.worker"
# Settings that change what is compiled: ours are set below, a user's must not leak in.
_FOREIGN = ("TRITON_", "PTXAS_", "DISABLE_", "LLVM_", "MLIR_", "NVPTX_")


def shipped_configurations() -> list[KernelConfig]:
    """Every configuration that goes into a bundle, by name."""
    ops = (linear_attention, matmul_nbits, sparse_attention)
    found = [config for op in ops for config in op.configurations()]
    return sorted(found, key=lambda each: each.name)


def compile_cubins(
    folder: Path, sm: int = 87, configs: Sequence[KernelConfig] | None = None, ptxas: Path | None = None
) -> Index:
    """Compile into ``folder``, which exists, as NAME.cubin and index.json.

    Args:
        sm: 87 (Orin) or 110 (Thor), or of a card that kernels are checked on: ``toolchain.PLATFORMS``.
        configs: by default all that are shipped.
        ptxas: instead of the installed one.

    Raises:
        BackendError: triton is not installed.
        ExportError: no fitting ptxas, a kernel that does not compile or that spills registers or needs
            scratch memory or clusters, or a full disk. The folder then has no index.
    """
    if find_spec("triton") is None:
        raise missing_dependency("triton", "jetson-export")
    toolchain = find_toolchain(sm, ptxas)
    configs = shipped_configurations() if configs is None else configs
    found = _run_worker(toolchain, configs, folder)
    for config, each in zip(configs, found, strict=True):
        _check(config, each)
    with disk_errors(folder):
        cubins = [
            Cubin.of(config, folder / f"{config.name}.cubin", each)
            for config, each in zip(configs, found, strict=True)
        ]
        index = Index(toolchain, found[0]["triton"], found[0]["ptx"], cubins)
        index.write(folder)
    return index


def _check(config: KernelConfig, found: dict[str, Any]) -> None:
    name = config.name
    if found["stack_bytes"]:
        raise ExportError(
            f"{name}: expected no spilled registers, got {found['stack_bytes']} bytes of stack a thread",
            hint="give it a smaller tile or more warps",
        )
    if any(found["scratch_bytes"]):
        raise ExportError(f"{name}: expected no scratch memory, got {found['scratch_bytes']} bytes")
    if (found["warps"], found["ctas"]) != (config.warps, 1):
        raise ExportError(
            f"{name}: expected {config.warps} warps and no clusters, got {found['warps']} warps in "
            f"{found['ctas']} blocks"
        )


def _run_worker(toolchain: Toolchain, configs: Sequence[KernelConfig], folder: Path) -> list[dict[str, Any]]:
    request = {
        "sm": toolchain.platform.sm,
        "ptx": toolchain.platform.ptxas.ptx,
        "folder": str(folder.resolve()),
        "configs": [each.to_json() for each in configs],
    }
    with tempfile.TemporaryDirectory(prefix="cpm-edge-triton-") as cache:
        done = subprocess.run(
            [sys.executable, "-m", WORKER],
            input=json.dumps(request),
            capture_output=True,
            text=True,
            env=_environment(toolchain, cache),
        )
    if done.returncode:
        raise ExportError(f"cubins: the Triton compiler failed: {_reason(done.stderr, done.returncode)}")
    found: list[dict[str, Any]] = json.loads(done.stdout)
    return found


def _reason(stderr: str, status: int) -> str:
    """One line: the first exception, because Triton's own, which follow it, quote the source.

    If there is only one of Triton's, what it says comes last.
    """
    lines = [each.strip() for each in stderr.splitlines() if each.strip()]
    errors = [each for each in lines if re.match(r"[\w.]*(Error|Exception)\b", each)]
    if errors and "CompilationError" not in errors[0]:
        return errors[0]
    return [f"exit status {status}", *lines][-1]


def _environment(toolchain: Toolchain, cache: str) -> dict[str, str]:
    """Triton's own settings: line information would put paths of this machine into the cubins."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith(_FOREIGN)}
    return kept | {
        "TRITON_CACHE_DIR": cache,
        "TRITON_DEFAULT_FP_FUSION": "1",
        "TRITON_DISABLE_LINE_INFO": "1",
        # Triton asks for its second one from sm_90 on.
        "TRITON_PTXAS_PATH": str(toolchain.ptxas),
        "TRITON_PTXAS_BLACKWELL_PATH": str(toolchain.ptxas),
    }
