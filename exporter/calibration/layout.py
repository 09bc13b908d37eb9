"""How the matrices of a saved checkpoint are stored, settled from names, shapes and schemes alone."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

from cpm_edge.exporter.errors import ExportError
from cpm_edge.quant import Scheme
from cpm_edge.quant.packed import NIBBLES

AWQ = "awq"


class Layout(NamedTuple):
    """How the integers of a checkpoint are stored.

    Attributes:
        method: "gptq" or "awq".
        group_size: of most matrices.
        other_groups: group sizes of the others, by module; GPTQ only.
        integers: modules that are quantized.
        floats: modules that are not.
        symmetric: zero point 8 everywhere.
    """

    method: str
    group_size: int
    other_groups: dict[str, int]
    integers: list[str]
    floats: list[str]
    symmetric: bool

    def quantization_config(self, damping: float) -> dict[str, Any]:
        """What config.json says.

        Which modules stay floats is said once for each reader: gptqmodel looks at ``dynamic`` alone,
        transformers and vLLM at ``modules_in_block_to_quantize`` for GPTQ and ``modules_to_not_convert`` for
        AWQ. A reader that misses it makes integers of memory that no file fills.
        """
        dynamic: dict[str, Any] = {f"-:^{_pattern(module)}$": {} for module in self.floats}
        if self.method == AWQ:
            return {
                "quant_method": "awq",
                "bits": 4,
                "group_size": self.group_size,
                "version": "gemm",
                "zero_point": True,
                "modules_to_not_convert": self.floats or None,
                **({"dynamic": dynamic} if dynamic else {}),
            }
        dynamic |= {f"+:^{_pattern(m)}$": {"group_size": size} for m, size in self.other_groups.items()}
        return {
            "quant_method": "gptq",
            "bits": 4,
            "group_size": self.group_size,
            "sym": self.symmetric,
            "desc_act": False,
            "static_groups": True,
            "checkpoint_format": "gptq" if self.symmetric else "gptq_v2",
            "damp_percent": damping,
            "true_sequential": False,
            "lm_head": False,
            **({"modules_in_block_to_quantize": [self.integers]} if self.floats else {}),
            **({"dynamic": dynamic} if dynamic else {}),
        }


def choose_layout(
    method: str, schemes: Mapping[str, Scheme], shapes: Mapping[str, tuple[int, ...]]
) -> Layout:
    """The layout of a method: AutoAWQ's for "awq", that of GPTQ for all others.

    Args:
        method: of the calibration.
        schemes: of the matrices that are int4, by tensor name.
        shapes: of all tensors.

    Raises:
        ExportError: the layout has no place for a matrix; says which.
    """
    kind = AWQ if method == AWQ else "gptq"
    groups: dict[str, int] = {}
    for name, scheme in schemes.items():
        if shapes[name][0] % NIBBLES:
            raise ExportError(
                f"--save-checkpoint: {kind} packs {NIBBLES} rows, and {name} has {shapes[name][0]}",
                hint="leave --save-checkpoint out",
            )
        assert scheme.group_size is not None
        groups[name.removesuffix(".weight")] = scheme.group_size
    if not groups:
        raise ExportError("--save-checkpoint: no matrix is int4", hint="choose a higher --ratio")
    sizes = list(groups.values())
    usual = max(set(sizes), key=lambda size: (sizes.count(size), size))
    others = {module: size for module, size in groups.items() if size != usual}
    if others and kind == AWQ:
        module, size = next(iter(others.items()))
        raise ExportError(
            f"--save-checkpoint: AWQ has one group size for all, and {module} has {size} instead of {usual}",
            hint=f"choose --group-size {min(sizes)}, or --method gptq+awq, whose layout can tell them apart",
        )
    matrices = [
        name.removesuffix(".weight")
        for name, shape in shapes.items()
        if ".layers." in name and name.endswith(".weight") and len(shape) == 2
    ]
    floats = [module for module in matrices if module not in groups]
    symmetric = all(scheme.symmetric for scheme in schemes.values())
    return Layout(kind, usual, others, list(groups), floats, symmetric)


def _pattern(module: str) -> str:
    return module.replace(".", r"\.")
