"""How many warps of a kernel a multiprocessor holds at a time, in theory."""

from __future__ import annotations

from dataclasses import dataclass

WARP = 32
REGISTERS = 65536  # of a multiprocessor; a warp gets them in 256s, and four warps at a time
_RESERVED_SHARED = 1024  # a block, for the system


@dataclass(frozen=True)
class Limits:
    """Of one multiprocessor: resident warps and blocks, and KiB of shared memory."""

    warps: int
    blocks: int
    shared: int


# CUDA C++ Programming Guide, technical specifications per compute capability; cuda_occupancy.h of CUDA 13.0.
LIMITS = {
    80: Limits(64, 32, 164),
    86: Limits(48, 16, 100),
    87: Limits(48, 16, 164),
    89: Limits(48, 24, 100),
    90: Limits(64, 32, 228),
    110: Limits(48, 24, 228),
    120: Limits(48, 24, 100),
}


def occupancy(sm: int, *, warps: int, registers: int, shared_bytes: int) -> float:
    """The share of the warps that a multiprocessor can hold, 0 to 1.

    Args:
        warps: of a block; registers: of a thread; shared_bytes: of a block, given out in 128s.
    """
    limits = LIMITS[sm]
    warp_registers = -(-registers * WARP // 256) * 256
    by_registers = (REGISTERS // warp_registers) // 4 * 4 // warps
    by_shared = (limits.shared << 10) // (-(-shared_bytes // 128) * 128 + _RESERVED_SHARED)
    return min(limits.blocks, limits.warps // warps, by_registers, by_shared) * warps / limits.warps
