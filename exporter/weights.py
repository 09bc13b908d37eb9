"""Weights on their way from a checkpoint to a file: read, checked, quantized and dropped in row blocks.

Peak memory is one row block with its temporaries, whatever the size of the model or of a tensor.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt

from cpm_edge.exporter.ahead import named, run_ahead
from cpm_edge.exporter.checkpoint import Checkpoint
from cpm_edge.exporter.checkpoint.integers import Order
from cpm_edge.exporter.errors import CheckpointError, ExportError
from cpm_edge.exporter.taken import REST, Taken
from cpm_edge.exporter.weight_file import Region
from cpm_edge.quant import (
    Policy,
    QuantError,
    Quantized,
    Scheme,
    TensorClass,
    WeightFormat,
    find_ternary,
    quantize,
)
from cpm_edge.quant.floats import check_finite, to_bf16_bits, to_fp16

Rows = npt.NDArray[Any]
Result = TypeVar("Result")

BLOCK_ELEMENTS = 1 << 20  # 4 MiB of float32

EMBEDDING = "model.embed_tokens.weight"
HEAD = "lm_head.weight"
ROUTER = ".mlp.gate.weight"
ABSORBED = ".kv_b_proj.weight"


@dataclass
class ModelWeights:
    """The tensors a graph needs, and how each of them is stored.

    Attributes:
        checkpoint: where they come from.
        shapes: expected shape of each tensor, by checkpoint name, as the graph declares it.
        constants: tensors that the config determines instead of the checkpoint.
        policy: the scheme of each class.
        notes: group sizes that had to shrink, by tensor name; filled by ``scheme``.
        taken: the checkpoint's own integers, where they are to be kept.
        found: schemes that the weights themselves determine (ternary groups, integers of the checkpoint), by
            tensor name; filled by ``scheme``, which reads a tensor once for it.
        own: tensors whose integers are those of ``taken``; filled by ``scheme``.
        stored_bytes: what the tensors of each class take in the bundle; filled by ``count_bytes``.
    """

    checkpoint: Checkpoint
    shapes: Mapping[str, tuple[int, ...]]
    constants: Mapping[str, npt.NDArray[np.float32]]
    policy: Policy
    taken: Taken | None = None
    notes: dict[str, str] = field(default_factory=dict)
    found: dict[str, Scheme] = field(default_factory=dict)
    own: set[str] = field(default_factory=set)
    stored_bytes: Counter[TensorClass] = field(default_factory=Counter)

    def check(self) -> None:
        """Compare names and shapes with the checkpoint, before any work.

        Raises:
            CheckpointError: a tensor is missing or has another shape.
        """
        for name, expected in self.shapes.items():
            if name not in self.constants:
                self._check_stored(name, list(expected))

    def find_schemes(self, progress: Callable[[int], None] = lambda elements: None) -> None:
        """Settle how every tensor is stored; ternary weights are read for it.

        Args:
            progress: called with the number of weight elements done.

        Raises:
            CheckpointError: a tensor is not ternary.
            ExportError: no group size fits the columns of a tensor.
        """
        for name in self.names():
            self.scheme(name)
            progress(self.elements(name))

    def _check_stored(self, name: str, expected: list[int]) -> None:
        hint = "config.json and the weights may come from different models"
        info = self.checkpoint.tensors.get(name)
        if info is None:
            raise CheckpointError(
                f"tensor {name}: expected shape {expected}, not in the checkpoint", hint=hint
            )
        if list(info.shape) != expected:
            raise CheckpointError(
                f"tensor {name}: expected shape {expected} as config.json says, got {list(info.shape)}",
                hint=hint,
            )

    def names(self) -> list[str]:
        """The tensors in the order of the checkpoint's files, then the constants."""
        stored = [name for name in self.checkpoint.tensors if name in self.shapes]
        return stored + [name for name in self.constants if name in self.shapes]

    def unused(self) -> list[str]:
        """Checkpoint tensors that the graph does not read."""
        return [name for name in self.checkpoint.tensors if name not in self.shapes]

    def elements(self, name: str) -> int:
        return int(np.prod(self.shapes[name]))

    def kind(self, name: str) -> TensorClass:
        return tensor_class(name, len(self.shapes[name]))

    def scheme(self, name: str) -> Scheme:
        """How the tensor is stored.

        Raises:
            CheckpointError: it should be ternary and is not, or its integers are damaged.
            ExportError: no group size fits its columns.
        """
        if name in self.found:
            return self.found[name]
        if self.taken is not None and (own := self._own(name, self.taken)) is not None:
            return self.found.setdefault(name, own)
        try:
            scheme, note = self.policy.scheme_for(self.kind(name), self.shapes[name][-1])
        except QuantError as error:
            raise ExportError(
                f"tensor {name}: {error.message}",
                hint="--weight-format int8 has one scale per row and takes any number of columns",
            ) from error
        if scheme.format is WeightFormat.TERNARY:
            return self.found.setdefault(name, self._ternary(name))
        if note:
            self.notes[name] = note
        return scheme

    def _own(self, name: str, taken: Taken) -> Scheme | None:
        """The checkpoint's own scheme; for linear layers that it left in floats REST."""
        kind = self.kind(name)
        if kind not in (TensorClass.LINEAR, TensorClass.HEAD, TensorClass.ABSORBED):
            return None
        own = taken.scheme(name)
        if own is not None:
            self.own.add(name)
            return own
        return REST if kind is TensorClass.LINEAR else None

    def column_order(self, name: str) -> Order | None:
        """The matrix column of each stored column, once the scheme is known; None: in their places."""
        return self.taken.column_order(name) if self.taken is not None and name in self.own else None

    def _ternary(self, name: str) -> Scheme:
        """The largest groups in which all rows of a tensor are ternary."""
        width, half = self.shapes[name][-1], True
        for block in self._each_block(name, find_ternary):
            width, half = min(width, block.width), half and block.half
        group = None if width == self.shapes[name][-1] else width
        return Scheme(WeightFormat.TERNARY, group, wide_scales=not half)

    def linear_scheme(self) -> tuple[Scheme, dict[str, str]]:
        """What most linear layers are stored in, and notes on the others by tensor name."""
        if not self.found:
            return self.policy.linear, self.notes
        linear = {name: s for name, s in self.found.items() if self.kind(name) is TensorClass.LINEAR}
        ((usual, _),) = Counter(linear.values()).most_common(1)
        others = {name: scheme.describe() for name, scheme in linear.items() if scheme != usual}
        return usual, self.notes | others

    def taken_from(self) -> dict[str, int]:
        """How many linear layers keep the integers of the checkpoint, by what these are stored as there."""
        linear = [name for name in self.found if self.kind(name) is TensorClass.LINEAR]
        origins = [self.checkpoint.packed.get(name, "trained int4") for name in linear if name in self.own]
        origins += ["ternary" for name in linear if self.found[name].format is WeightFormat.TERNARY]
        return dict(Counter(origins))

    def head_scheme(self) -> Scheme:
        """What the output head is stored in, be it the embedding or a tensor of its own."""
        return self.scheme(HEAD if HEAD in self.shapes else EMBEDDING)

    def absorbed_format(self) -> str | None:
        """What the up-projections of latent attention are stored in; None for models without."""
        names = (name for name in self.shapes if self.kind(name) is TensorClass.ABSORBED)
        return next((self.scheme(name).describe() for name in names), None)

    def count_bytes(self, name: str, region: Region) -> None:
        """Note that a part of the tensor was written."""
        self.stored_bytes[self.kind(name)] += region.length

    def linear_parameters(self) -> int:
        """Weights of all linear layers."""
        return sum(self.elements(name) for name in self.shapes if self.kind(name) is TensorClass.LINEAR)

    def blocks(self, name: str) -> Iterator[npt.NDArray[np.float32]]:
        """The tensor as float32 row blocks, each with a multiple of 8 rows but the last.

        Raises:
            CheckpointError: a value is NaN or infinite; names the tensor and the row.
        """
        if name in self.constants:
            yield self.constants[name]
            return
        shape = self.shapes[name]
        step = max(BLOCK_ELEMENTS // (shape[-1] if len(shape) > 1 else 1) & ~7, 8)
        for start in range(0, shape[0], step):
            block = self.checkpoint.read(name, start, min(start + step, shape[0]))
            with named(name, start):
                check_finite(block.reshape(len(block), -1))
            yield block

    def quantized(self, name: str) -> Iterator[Quantized]:
        """The tensor's row blocks in its integer scheme; columns in the order of ``column_order``."""
        scheme = self.scheme(name)
        if name in self.own:
            assert self.taken is not None
            return run_ahead(name, self.taken.jobs(name, scheme))
        return self._each_block(name, lambda block: quantize(block, scheme))

    def _each_block(self, name: str, work: Callable[[npt.NDArray[np.float32]], Result]) -> Iterator[Result]:
        """``work`` on the tensor's row blocks in order."""

        def jobs() -> Iterator[tuple[int, Callable[[], Result]]]:
            start = 0
            for block in self.blocks(name):
                yield start, partial(work, block)
                start += len(block)

        return run_ahead(name, jobs())

    def stored(self, name: str) -> Iterator[Rows]:
        """The tensor's row blocks in its float scheme: float32, float16, or bfloat16 as uint16 bits."""
        convert = _CONVERT[self.scheme(name).format]
        start = 0
        for block in self.blocks(name):
            with named(name, start):
                yield convert(block)
            start += len(block)

    def dequantized(self, name: str) -> npt.NDArray[np.float32]:
        """The whole tensor as the bundle holds it, float32: what ``--verify`` compares against."""
        scheme = self.scheme(name)
        result = np.empty(self.shapes[name], np.float32)
        start = 0
        if scheme.format.is_float:
            for rows in self.stored(name):
                result[start : start + len(rows)] = _widen(rows)
                start += len(rows)
        else:
            for block in self.quantized(name):
                result[start : start + len(block.codes)] = block.dequantize()
                start += len(block.codes)
            if (order := self.column_order(name)) is not None:
                sorted_columns, result = result, np.empty_like(result)
                result[:, order] = sorted_columns
        return result


def tensor_class(name: str, rank: int) -> TensorClass:
    """What a tensor is for, by its checkpoint name and number of dimensions."""
    if name == EMBEDDING:
        return TensorClass.EMBEDDING
    if name == HEAD:
        return TensorClass.HEAD
    if name.endswith(ROUTER):
        return TensorClass.OTHER
    if name.endswith(ABSORBED):
        return TensorClass.ABSORBED
    return TensorClass.LINEAR if rank == 2 else TensorClass.NORM


def _fp16(block: npt.NDArray[np.float32]) -> Rows:
    return to_fp16(block.reshape(len(block), -1)).reshape(block.shape)


_CONVERT: dict[WeightFormat, Callable[[npt.NDArray[np.float32]], Rows]] = {
    WeightFormat.FP32: lambda block: block,
    WeightFormat.FP16: _fp16,
    WeightFormat.BF16: to_bf16_bits,
}


def _widen(rows: Rows) -> npt.NDArray[np.float32]:
    if rows.dtype == np.uint16:
        return (rows.astype(np.uint32) << 16).view(np.float32)
    return rows.astype(np.float32, copy=False)
