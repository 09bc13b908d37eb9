"""What the options and the graph ask of the weights, against what the checkpoint has."""

from __future__ import annotations

import warnings

from cpm_edge.exporter.checkpoint import Checkpoint
from cpm_edge.exporter.errors import ExportError, ExportWarning
from cpm_edge.exporter.options import ExportOptions
from cpm_edge.exporter.weights import HEAD, ModelWeights
from cpm_edge.quant import WeightFormat


def check_groups(options: ExportOptions, weights: ModelWeights) -> None:
    """Refuse a group size or zero points that are not those of weights that are taken as they are.

    Raises:
        ExportError: names the tensor.
    """
    asked = options.group_size
    taken = {name for name, scheme in weights.found.items() if scheme.format is WeightFormat.TERNARY}
    for name in sorted(taken | weights.own):
        scheme = weights.found[name]
        other_size = asked is not None and asked != (scheme.group_size or weights.shapes[name][-1])
        if other_size or (scheme.symmetric and not options.symmetric):
            option, value = ("--group-size", f" {asked}") if other_size else ("--asym", "")
            raise ExportError(
                f"{option}{value}: tensor {name} is {scheme.describe()}, and weights that are taken as they "
                "are keep the groups of the checkpoint",
                hint=f"leave {option} out, or choose --weight-format int4",
            )


def warn_of_unused(weights: ModelWeights, tied: bool) -> None:
    """Say what the graph leaves out: a bias in the checkpoint, say, that config.json does not mention."""
    derived = {HEAD} if tied else set()
    names = [name for name in weights.unused() if name not in derived and not name.endswith(".inv_freq")]
    names = [name for name in names if not _is_empty_bias(weights.checkpoint, name)]
    if names:
        more = f" and {len(names) - 3} more" if len(names) > 3 else ""
        message = f"tensors that the model does not use: {', '.join(names[:3])}{more}"
        warnings.warn(message, ExportWarning, stacklevel=2)


def _is_empty_bias(checkpoint: Checkpoint, name: str) -> bool:
    """Old GPTQ tools give every matrix a bias, all zeros where the model has none."""
    module, _, ending = name.rpartition(".")
    return ending == "bias" and f"{module}.weight" in checkpoint.packed and not checkpoint.read(name).any()
