"""Which format the linear layers get: the checkpoint's own when it has one."""

from __future__ import annotations

import warnings

from cpm_edge.exporter.checkpoint import Checkpoint
from cpm_edge.exporter.errors import ExportWarning
from cpm_edge.exporter.weights import tensor_class
from cpm_edge.quant import TensorClass, WeightFormat, is_ternary

SAMPLED_TENSORS = 5
SAMPLED_ROWS = 8


def choose_format(asked: str, checkpoint: Checkpoint) -> WeightFormat:
    """The format for ``--weight-format``: ``auto`` is ternary for ternary checkpoints, else int4.

    Warns with ExportWarning when integers of the checkpoint are about to be rounded again.
    """
    if asked == "auto":
        return WeightFormat.TERNARY if looks_ternary(checkpoint) else WeightFormat.INT4
    chosen = WeightFormat(asked)
    if chosen in (WeightFormat.INT4, WeightFormat.INT8) and looks_ternary(checkpoint):
        warnings.warn(
            f"the linear layers of {checkpoint.name} are ternary and {asked} quantizes them again; "
            "--weight-format auto keeps them as they are, in 2 bits",
            ExportWarning,
            stacklevel=2,
        )
    return chosen


def looks_ternary(checkpoint: Checkpoint) -> bool:
    """Whether at least half of some sampled rows of the linear layers are ternary.

    Rows of other checkpoints never are, so a damaged row does not hide that the rest is ternary: the export
    then refuses the tensor instead of rounding all of them.
    """
    names = [
        name
        for name, info in checkpoint.tensors.items()
        if tensor_class(name, len(info.shape)) is TensorClass.LINEAR and min(info.shape) > 0
    ]
    votes = []
    for name in names[:: max(len(names) // SAMPLED_TENSORS, 1)]:
        middle = checkpoint.tensors[name].shape[0] // 2
        start = max(middle - SAMPLED_ROWS // 2, 0)
        rows = checkpoint.read(name, start, min(start + SAMPLED_ROWS, checkpoint.tensors[name].shape[0]))
        votes += [vote for vote in map(is_ternary, rows) if vote is not None]
    return bool(votes) and 2 * sum(votes) >= len(votes)
