"""Which format the linear layers get: the checkpoint's own when it has one."""

from __future__ import annotations

import math
import warnings
from collections import Counter
from typing import NamedTuple

from cpm_edge.exporter.checkpoint import Checkpoint
from cpm_edge.exporter.checkpoint.tensors import DTYPES
from cpm_edge.exporter.errors import ExportWarning
from cpm_edge.exporter.options import ExportOptions
from cpm_edge.exporter.taken import StoredIntegers, Taken
from cpm_edge.exporter.weights import HEAD, ModelWeights, tensor_class
from cpm_edge.quant import Scheme, TensorClass, WeightFormat, is_ternary

SAMPLED_TENSORS = 5
SAMPLED_ROWS = 8


class Choice(NamedTuple):
    """The format of the linear layers, and the checkpoint's own integers if these are to be kept."""

    format: WeightFormat
    taken: Taken | None = None


def choose_format(options: ExportOptions, checkpoint: Checkpoint) -> Choice:
    """What ``--weight-format`` comes to: ``auto`` is the checkpoint's own format, else int4.

    Integers of the checkpoint are kept too when their format is asked for by name, unless another group size
    or zero points are asked for with it.

    Warns with ExportWarning when integers of the checkpoint are about to be rounded again.

    Raises:
        CheckpointError: the integers are damaged.
    """
    asked = options.weight_format
    own = own_format(checkpoint)
    if own is not None:
        keep = StoredIntegers(checkpoint, frozenset({HEAD} if options.head_format else ()))
        if asked == "auto" or (asked == own.format.value and _fits(options, own)):
            return Choice(own.format, keep)
        chosen = WeightFormat(asked)
        if chosen not in (WeightFormat.FP32, WeightFormat.TERNARY):
            _warn_of_rounding(f"{checkpoint.name} are {own.describe()}", asked)
        return Choice(chosen)
    ternary = looks_ternary(checkpoint)
    if asked == "auto":
        return Choice(WeightFormat.TERNARY if ternary else WeightFormat.INT4)
    if ternary and asked in ("int4", "int8"):
        _warn_of_rounding(f"{checkpoint.name} are ternary", asked, ", in 2 bits")
    return Choice(WeightFormat(asked))


def own_format(checkpoint: Checkpoint) -> Scheme | None:
    """The scheme of the integers that most linear layers are stored in; None when most have none.

    Raises:
        CheckpointError: the integers are damaged.
    """
    elements: Counter[str | None] = Counter()
    first: dict[str | None, str] = {}
    for name, info in checkpoint.tensors.items():
        if tensor_class(name, len(info.shape)) is TensorClass.LINEAR:
            kept = checkpoint.packed.get(name)
            elements[kept] += math.prod(info.shape)
            first.setdefault(kept, name)
    if not elements:
        return None
    ((usual, _),) = elements.most_common(1)
    integers = None if usual is None else checkpoint.integers(first[usual])
    return None if integers is None else integers.scheme


def _fits(options: ExportOptions, own: Scheme) -> bool:
    """Whether the group size and zero points that were asked for are the checkpoint's."""
    return options.group_size in (None, own.group_size) and (options.symmetric or not own.symmetric)


def _warn_of_rounding(what: str, asked: str, how: str = "") -> None:
    warnings.warn(
        f"the linear layers of {what} and {asked} quantizes them again; "
        f"--weight-format auto keeps them as they are{how}",
        ExportWarning,
        stacklevel=3,
    )


def note_rounded(weights: ModelWeights) -> None:
    """Warn with ExportWarning of GGUF blocks that are rounded again although nothing else was asked for.

    Args:
        weights: with their schemes found.
    """
    if weights.taken is None and own_format(weights.checkpoint) is not None:
        return  # choose_format has said so
    kinds: Counter[tuple[str, str]] = Counter()
    for name in weights.shapes:
        info = weights.checkpoint.tensors.get(name)
        if info is None or info.dtype in DTYPES or weights.kind(name) is not TensorClass.LINEAR:
            continue
        scheme = weights.scheme(name)
        if name not in weights.own and scheme.format in (WeightFormat.INT4, WeightFormat.INT8):
            kinds[info.dtype, scheme.describe()] += 1
    for (kind, stored), count in kinds.items():
        message = f"{count} linear layers are stored as {kind} and are quantized again, to {stored}"
        warnings.warn(message, ExportWarning, stacklevel=2)


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
