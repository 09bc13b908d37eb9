"""The process that compiles: a request on stdin, cubins in a folder, what they need on stdout, all JSON.

A process of its own, because Triton reads its settings from the environment when it is imported, and because
whoever asks may have imported it as an interpreter.
"""

from __future__ import annotations

import importlib
import json
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from cpm_edge.plugins.kernel_config import ALIGNMENT, KernelConfig

_USAGE = re.compile(r"REG:(\d+) STACK:(\d+)")


def main() -> None:
    """Compile every configuration of the request."""
    request = json.load(sys.stdin)
    found = [
        _compile(KernelConfig.from_json(each), request["sm"], request["ptx"], Path(request["folder"]))
        for each in request["configs"]
    ]
    json.dump(found, sys.stdout)


def _compile(config: KernelConfig, sm: int, ptx: int, folder: Path) -> dict[str, Any]:
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    function = getattr(importlib.import_module(config.module), config.function)
    number = {name: index for index, name in enumerate(function.arg_names)}
    source = ASTSource(
        function,
        {name: config.signature[name] for name in function.arg_names},
        constexprs={(number[name],): value for name, value in config.constants.items()},
        attrs={
            (number[each.name],): [["tt.divisibility", ALIGNMENT]]
            for each in config.parameters
            if each.aligned
        },
    )
    options = {"num_warps": config.warps, "num_stages": config.stages, "ptx_version": ptx}
    compiled = triton.compile(source, target=GPUTarget("cuda", sm, 32), options=options)
    metadata = compiled.metadata
    path = folder / f"{config.name}.cubin"
    path.write_bytes(compiled.asm["cubin"])
    registers, stack = _resources(path)
    return {
        "entry": metadata.name,
        "triton": triton.__version__,
        "ptx": re.search(r"^\.version (\S+)", compiled.asm["ptx"], re.MULTILINE)[1],  # type: ignore[index]
        "warps": metadata.num_warps,
        "ctas": metadata.num_ctas,
        "shared_bytes": metadata.shared,
        "scratch_bytes": [metadata.global_scratch_size, metadata.profile_scratch_size],
        "registers": registers,
        "stack_bytes": stack,
    }


def _resources(path: Path) -> tuple[int, int]:
    """Registers and bytes of stack a thread."""
    from triton import knobs

    # cuobjdump leaves temporary files where it is started.
    with tempfile.TemporaryDirectory() as folder:
        command = [knobs.nvidia.cuobjdump.path, "-res-usage", str(path.resolve())]
        text = subprocess.run(command, check=True, capture_output=True, text=True, cwd=folder).stdout
    found = _USAGE.search(text)
    if found is None:
        raise ValueError(f"cuobjdump: expected the resources of {path.name}, got {text!r}")
    return int(found[1]), int(found[2])


if __name__ == "__main__":
    main()
