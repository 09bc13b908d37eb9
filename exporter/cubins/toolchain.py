"""The assembler of a device's CUDA: a newer one may make cubins that the device's driver refuses."""

from __future__ import annotations

import re
import subprocess
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

from cpm_edge.exporter.errors import ExportError


@dataclass(frozen=True)
class Ptxas:
    """A wheel with an assembler at ``path`` in package ``nvidia``; ``ptx`` is its newest PTX, times ten."""

    package: str
    path: str
    ptx: int


@dataclass(frozen=True)
class Platform:
    """What a device runs.

    Attributes:
        sm: compute capability times ten.
        jetpack: the oldest supported one; None for cards, on which kernels are only checked and measured.
        cuda: major and minor version of its CUDA, or of the oldest driver that is expected on a card.
        ptxas: no newer than this CUDA.
    """

    sm: int
    jetpack: str | None
    cuda: tuple[int, int]
    ptxas: Ptxas


# PTX versions: release notes of the PTX ISA. 13.0 is the first CUDA that knows Thor as sm_110; its wheel is
# smaller than that of 13.2, which JetPack 7.2 has.
_CUDA_12 = Ptxas("nvidia-cuda-nvcc-cu12==12.6.85", "cuda_nvcc/bin/ptxas", 85)
_CUDA_13 = Ptxas("nvidia-cuda-nvcc==13.0.88", "cu13/bin/ptxas", 90)

# CUDA of JetPack 6.2 and 7.2: their release notes. Orin on JetPack 7.2 runs the cubins of 6.2.
PLATFORMS = {
    87: Platform(87, "JetPack 6.2", (12, 6), _CUDA_12),
    110: Platform(110, "JetPack 7.2", (13, 2), _CUDA_13),
    **{sm: Platform(sm, None, (12, 6), _CUDA_12) for sm in (80, 86, 89, 90)},
    120: Platform(120, None, (13, 2), _CUDA_13),
}


@dataclass(frozen=True)
class Toolchain:
    """A platform and an assembler that fits it; ``version`` is the assembler's, like 12.6.85."""

    platform: Platform
    ptxas: Path
    version: str


def platform_of(sm: int) -> Platform:
    """Raises ExportError for an SM that no cubins are made for."""
    if sm not in PLATFORMS:
        known = ", ".join(f"sm_{each}" for each in PLATFORMS)
        raise ExportError(f"cubins: expected one of {known}, got sm_{sm}", hint="choose a chip of these")
    return PLATFORMS[sm]


def find_toolchain(sm: int, ptxas: Path | None = None) -> Toolchain:
    """The assembler of the installed wheel, or the one at ``ptxas``.

    Raises:
        ExportError: none is installed, it does not run, or it is newer than the platform's CUDA.
    """
    platform = platform_of(sm)
    path = ptxas or _installed(platform.ptxas)
    hint = f"pip install {platform.ptxas.package}"
    if path is None:
        raise ExportError(f"ptxas of CUDA {_dotted(platform.cuda)} is not installed", hint=hint)
    version = ptxas_version(path)
    if tuple(map(int, version.split(".")[:2])) > platform.cuda:
        raise ExportError(
            f"{path}: expected ptxas of CUDA {_dotted(platform.cuda)} or older for sm_{sm} "
            f"({platform.jetpack or 'a card'}), got {version}",
            hint=hint,
        )
    return Toolchain(platform, path, version)


def ptxas_version(path: Path) -> str:
    """Its version, like 12.6.85.

    Raises:
        ExportError: it does not run, or says something else.
    """
    try:
        done = subprocess.run([path, "--version"], capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError) as error:
        raise ExportError(f"{path}: expected ptxas, which did not run: {error}") from error
    found = re.search(r"\bV(\d+\.\d+\.\d+)", done.stdout)
    if found is None:
        raise ExportError(f"{path}: expected the version of ptxas, got {done.stdout.strip()!r}")
    return found[1]


def _installed(ptxas: Ptxas) -> Path | None:
    spec = find_spec("nvidia")
    for folder in (spec.submodule_search_locations or ()) if spec else ():
        path = Path(folder) / ptxas.path
        if path.is_file():
            return path
    return None


def _dotted(version: tuple[int, int]) -> str:
    return f"{version[0]}.{version[1]}"
