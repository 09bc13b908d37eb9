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
from cpm_edge.exporter.taken import (
    GridIntegers,
    StoredIntegers,
    Taken,
    sampled_rows,
    sampled_votes,
)
from cpm_edge.exporter.weights import HEAD, ModelWeights, tensor_class
from cpm_edge.quant import Scheme, TensorClass, WeightFormat, is_ternary
from cpm_edge.quant.qat import BITS_OF, find_grid

SAMPLED_TENSORS = 5
_MULTIPLIED = (TensorClass.LINEAR, TensorClass.ABSORBED)
# Formats that round the weights of ternary and trained checkpoints; 16-bit floats hold these.
ROUNDING = ("int4", "int8")


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
    left = frozenset({HEAD} if options.head_format else ())
    if checkpoint.calibrated:
        return Choice(WeightFormat.INT4, StoredIntegers(checkpoint, left))
    if (own := own_format(checkpoint)) is not None:
        return _choose(options, checkpoint, own, own.describe(), StoredIntegers(checkpoint, left))
    if looks_ternary(checkpoint):
        return _choose(options, checkpoint, Scheme(WeightFormat.TERNARY), "ternary", None)
    if (grid := grid_format(checkpoint)) is not None:
        what = f"{grid.describe()} by their training"
        return _choose(options, checkpoint, grid, what, GridIntegers(checkpoint, left))
    return Choice(WeightFormat.INT4 if asked == "auto" else WeightFormat(asked))


def _choose(
    options: ExportOptions, checkpoint: Checkpoint, own: Scheme, what: str, taken: Taken | None
) -> Choice:
    """``taken`` if its scheme ``own`` is what was asked for; else a word about the rounding."""
    asked = options.weight_format
    if asked == "auto" or (asked == own.format.value and _fits(options, own)):
        return Choice(own.format, taken)
    if asked in ROUNDING or (isinstance(taken, StoredIntegers) and asked in ("fp16", "bf16")):
        warnings.warn(
            f"the linear layers of {checkpoint.name} are {what} and {asked} quantizes them again; "
            "--weight-format auto keeps them as they are",
            ExportWarning,
            stacklevel=4,
        )
    return Choice(WeightFormat(asked))


def own_format(checkpoint: Checkpoint) -> Scheme | None:
    """The scheme of the integers that most linear layers are stored in; None when most have none.

    In GPTQ and AWQ checkpoints those in floats do not count, however many: they were left out as sensitive.

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
    if checkpoint.kind != "gguf":
        elements.pop(None, None)
    if not elements:
        return None
    ((usual, _),) = elements.most_common(1)
    integers = None if usual is None else checkpoint.integers(first[usual])
    return None if integers is None else integers.scheme


def _fits(options: ExportOptions, own: Scheme) -> bool:
    """Whether the group size and zero points that were asked for are the checkpoint's."""
    return options.group_size in (None, own.group_size) and (options.symmetric or not own.symmetric)


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
        if info is None or info.dtype in DTYPES or weights.kind(name) not in _MULTIPLIED:
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
    votes = []
    for name in _sampled_names(checkpoint):
        found = map(is_ternary, sampled_rows(checkpoint, name))
        votes += [vote for vote in found if vote is not None]
    return bool(votes) and 2 * sum(votes) >= len(votes)


def grid_format(checkpoint: Checkpoint) -> Scheme | None:
    """The scheme of int4 grids on which at least half of some sampled rows lie, None when they do not."""
    votes: list[bool] = []
    widths = []
    for name in _sampled_names(checkpoint):
        own = sampled_votes(checkpoint, name)
        votes += own
        if own and all(own):
            bits = BITS_OF[checkpoint.tensors[name].dtype]
            widths.append(find_grid(sampled_rows(checkpoint, name), bits).width)
    if not widths or 2 * sum(votes) < len(votes):
        return None
    return Scheme(WeightFormat.INT4, Counter(widths).most_common(1)[0][0])


def _sampled_names(checkpoint: Checkpoint) -> list[str]:
    """A few linear layers from all over the model."""
    names = [
        name
        for name, info in checkpoint.tensors.items()
        if tensor_class(name, len(info.shape)) is TensorClass.LINEAR and min(info.shape) > 0
    ]
    return names[:: max(len(names) // SAMPLED_TENSORS, 1)]
