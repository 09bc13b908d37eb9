"""What ``cpm.SparseAttention`` launches on an NVIDIA GPU, and the scratch memory that it takes.

Rows are appended first; then a sparse layer scores and lists blocks; then tiles of queries attend. Everything
that depends on the position (dense or sparse, how many blocks) is decided by the kernels, which read
past_length: grids do not depend on it.
"""

from __future__ import annotations

from cpm_edge.plugins.kernel_config import KernelConfig
from cpm_edge.plugins.launch_plan import (
    ROWS,
    Argument,
    Launch,
    LaunchPlan,
    Variant,
    Workspace,
    distinct,
    inputs,
    outputs,
    workspaces,
)
from cpm_edge.plugins.sparse_attention.kernel_configs import FEW_ROWS, AttentionKernels, Tiling
from cpm_edge.plugins.sparse_attention.spec import SparseAttentionSpec

INPUTS = ("query", "key", "value", "", "", "past_length")
# The caches are inputs 3, 4 and 6 too: an output is the same memory.
OUTPUTS = ("output", "keys", "values", "pooled")

# Sizes of known models: heads, kv heads, head size.
_DENSE = ((16, 2, 64), (9, 3, 64), (24, 8, 64), (36, 36, 64), (16, 2, 128), (32, 2, 128), (32, 8, 128))
_SPARSE = ((16, 2, 64), (32, 2, 128))
_CAPACITIES = (32768, 131072)


def plan(spec: SparseAttentionSpec, size: int, capacity: int) -> LaunchPlan:
    """The launches of one layer: variants for one new row, for few, and for any number.

    Inputs and outputs are those of ``spec.py`` in its order, batch 1, float16, past_length int32;
    pooled_cache and present_pooled are there if the spec is sparse. Caches are updated in place.

    Args:
        size: floats of a head.
        capacity: rows of the cache, a multiple of 16, in a sparse layer of a block.

    Raises:
        ValueError: latent attention, or sizes that the kernels do not take.
    """
    kernels = AttentionKernels(spec, size, capacity)
    tilings: dict[int | None, Tiling] = {
        1: Tiling.decode(spec),
        FEW_ROWS: Tiling.few(spec, size, kernels.blocks),
        None: Tiling.prefill(spec, size, kernels.blocks),
    }
    variants = []
    for limit, tiling in tilings.items():
        values = _arguments(spec, capacity, tiling)
        launches = (
            Launch(each, {parameter.name: values[parameter.name] for parameter in each.parameters})
            for each in kernels.in_order(tiling)
        )
        variants.append(Variant(limit, tuple(launches)))
    return LaunchPlan(tuple(variants), _workspaces(kernels, tilings))


def configurations() -> list[KernelConfig]:
    """The kernels of known models at usual context lengths, by name."""
    plans = [
        plan(SparseAttentionSpec.dense(heads, kv_heads, size**-0.5), size, _CAPACITIES[0])
        for heads, kv_heads, size in _DENSE
    ]
    for heads, kv_heads, size in _SPARSE:
        spec = SparseAttentionSpec(heads, kv_heads, size**-0.5)
        plans += [plan(spec, size, capacity) for capacity in _CAPACITIES]
    return distinct(plans)


def _arguments(spec: SparseAttentionSpec, capacity: int, tiling: Tiling) -> dict[str, Argument]:
    """By parameter; a name means the same in every kernel."""
    numbers: dict[str, Argument] = {
        "rows": ROWS,
        "heads": spec.num_heads,
        "kv_heads": spec.kv_num_heads,
        "capacity": capacity,
        "dense_len": spec.dense_len,
        "init_blocks": spec.init_blocks,
        "local_blocks": spec.local_blocks,
        "budget": spec.budget,
        "splits": tiling.splits,
        "scale": float(spec.scale),
    }
    scratch = workspaces("statistics", "scores", "chosen", "counts", "partial", "partial_statistics")
    return inputs(*INPUTS) | outputs(*OUTPUTS) | scratch | numbers


def _workspaces(kernels: AttentionKernels, tilings: dict[int | None, Tiling]) -> tuple[Workspace, ...]:
    """Any number of rows is not split, so parts do not grow with them."""
    kv_heads, prefill = kernels.spec.kv_num_heads, tilings[None]
    rows = max(
        -(-limit // each.positions) * each.splits * each.rows
        for limit, each in tilings.items()
        if limit is not None
    )
    parts = 4 * kv_heads * rows
    found = [Workspace("partial", parts * kernels.size, ()), Workspace("partial_statistics", 2 * parts, ())]
    if kernels.blocks:
        tile = (prefill.positions,)
        rows = max(each.splits * each.positions * each.heads for each in tilings.values())
        found += [
            Workspace("statistics", 8 * kv_heads * rows, tile),
            Workspace("scores", 8 * kv_heads * kernels.blocks),
            Workspace("chosen", 4 * kv_heads * kernels.blocks, tile),
            Workspace("counts", 4 * kv_heads, tile),
        ]
    return tuple(found)
