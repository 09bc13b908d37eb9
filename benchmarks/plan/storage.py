"""Bytes of weights as each target writes them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

from cpm_edge.benchmarks.plan.errors import PlanError
from cpm_edge.benchmarks.plan.shape import (
    ABSORBED,
    EMBEDDING,
    EXPERT,
    HEAD,
    LINEAR,
    OTHER,
    Matrix,
    ModelShape,
)

FLOATS = {"fp32": 4, "fp16": 2, "bf16": 2}
BITS = {"int8": 8, "int4": 4, "ternary": 2}
WEIGHT_FORMATS = (*FLOATS, *BITS)
GROUPS = (32, 64, 128)
PAGE = 4096  # tensors begin on one
PANEL_ROWS = 8
TERNARY_GROUP = 128


@dataclass(frozen=True)
class Format:
    """How one class of matrices is stored; a group of 0 is one scale a row."""

    name: str
    group: int = 0
    symmetric: bool = True

    def describe(self) -> str:
        """As in a manifest: ``int4 g32 sym``, ``int8 row sym``, ``ternary g128``, ``bf16``."""
        if self.name in FLOATS:
            return self.name
        group = f"g{self.group}" if self.group else "row"
        return f"{self.name} {group}" + (
            "" if self.name == "ternary" else " sym" if self.symmetric else " asym"
        )


@dataclass(frozen=True)
class Formats:
    """The formats of a model's matrices, as ``--weight-format`` and its relatives settle them."""

    linear: Format
    embedding: Format
    head: Format

    @classmethod
    def settle(
        cls,
        shape: ModelShape,
        weight_format: str,
        group_size: int | None,
        symmetric: bool,
        embedding: str | None = None,
        head: str | None = None,
    ) -> Formats:
        """auto is int4, in the groups of a config's quantization_config where it has one.

        Raises:
            PlanError: a format or a group that does not exist.
        """
        if weight_format == "auto":
            weight_format = "int4"
            if group_size is None and shape.quantized is not None:
                group_size = _known_group(shape.quantized)
        for name, value, known in (
            ("--weight-format", weight_format, WEIGHT_FORMATS),
            ("--group-size", group_size or GROUPS[0], GROUPS),
            ("--embedding-format", embedding or "int8", WEIGHT_FORMATS),
            ("--head-format", head or "int8", WEIGHT_FORMATS),
        ):
            if value not in known:
                raise PlanError(f"{name}: expected {', '.join(map(str, known))}, got {value}")
        if weight_format == "int4":
            linear = Format("int4", group_size or GROUPS[0], symmetric)
        else:
            linear = Format(weight_format, TERNARY_GROUP if weight_format == "ternary" else 0)
        outer = "int8" if weight_format in ("int4", "ternary") else weight_format
        if shape.tied:
            embedding = head = embedding or head
        return cls(linear, Format(embedding or outer), Format(head or outer))

    def of(self, kind: str) -> Format:
        """The format of one kind of matrix."""
        if kind in (LINEAR, EXPERT):
            return self.linear
        if kind == EMBEDDING:
            return self.embedding
        if kind == HEAD:
            return self.head
        if kind in (ABSORBED, OTHER) and self.linear.name in FLOATS:
            return self.linear
        return Format("int8") if kind == ABSORBED else Format("fp32")


def _known_group(quantized: Mapping[str, object]) -> int | None:
    group = quantized.get("group_size")
    return (
        max((size for size in GROUPS if group % size == 0), default=None) if isinstance(group, int) else None
    )


@dataclass(frozen=True)
class WeightBytes:
    """Bytes of the weight file by class, and what of it one token reads."""

    file: Mapping[str, int]
    read: float

    @property
    def total(self) -> int:
        return sum(self.file.values())


def weight_bytes(shape: ModelShape, formats: Formats, target: str, flavour: str) -> WeightBytes:
    """What a bundle's weight file holds.

    Raises:
        PlanError: the native flavour has no such format.
    """
    native = target == "aipc" and flavour == "native"
    if native and formats.linear.name in FLOATS:
        raise PlanError(
            f"--weight-format: expected int4, int8 or ternary in the native flavour, got "
            f"{formats.linear.name}",
            hint="--flavour stock",
        )
    file: dict[str, int] = {}
    read = 0.0
    for matrix in shape.matrices:
        form = formats.of(matrix.kind)
        # A tied head is the embedding's tensor, but where the engine keeps it in a layout of its own.
        shared = shape.tied and matrix.kind == HEAD and not native and target not in ("jetson",)
        size = _stored(matrix, form, target, native)
        if matrix.kind in (LINEAR, EXPERT, HEAD, ABSORBED, EMBEDDING):
            read += size * matrix.read
        if not shared:
            file[matrix.kind] = file.get(matrix.kind, 0) + size
    return WeightBytes(file, read)


def _stored(matrix: Matrix, form: Format, target: str, native: bool) -> int:
    """Bytes of all tensors of one kind and shape, each part on a page of its own."""
    if form.name in FLOATS:
        return matrix.count * _pages(matrix.rows * matrix.cols * FLOATS[form.name])
    form = replace(form, group=_fitted(form.group, matrix.cols))
    if native and matrix.kind in (LINEAR, EXPERT, HEAD):
        return matrix.count * _panels(matrix, form)
    bits = BITS[form.name]
    if matrix.kind == EXPERT and target == "aipc" and bits == 2:
        bits = 4  # the plugins multiply with chosen experts of 4 and 8 bits
    codes = matrix.rows * matrix.cols * bits // 8
    groups = matrix.cols // form.group if form.group else 1
    if target == "ort" and matrix.kind != ABSORBED:
        block = _ort_block(form, matrix.cols)
        parts = [codes, 4 * matrix.rows * (matrix.cols // block)]
        if not form.group and form.name == "int8":
            parts.append(4 * matrix.rows)
        if not form.symmetric:
            parts.append(matrix.rows * -(-(matrix.cols // block) // 2))
    else:
        scale = 4 if target == "ort" else 2
        parts = [codes, scale * matrix.rows * groups]
        if target == "ort":
            parts.append(matrix.rows * groups)
        elif not form.symmetric:
            parts.append(matrix.rows * groups // 2)
    return matrix.count * sum(map(_pages, parts))


def _panels(matrix: Matrix, form: Format) -> int:
    """Panels of 8 rows: for each group the scales, zero points and codes of all of them."""
    cols = -(-matrix.cols // 32) * 32
    groups = cols // form.group if form.group else 1
    header = groups * (2 if form.symmetric else 3)
    return -(-matrix.rows // PANEL_ROWS) * PANEL_ROWS * (cols * BITS[form.name] // 8 + header)


def _ort_block(form: Format, cols: int) -> int:
    """Of MatMulNBits: the group, or without one the largest that leaves no rest."""
    least, block = (32, min(form.group or 256, 128)) if form.name == "ternary" else (16, form.group or 256)
    while cols % block and block > least:
        block //= 2
    return block


def _fitted(group: int, cols: int) -> int:
    """The group, or the next smaller one that divides the columns."""
    while group > GROUPS[0] and cols % group:
        group //= 2
    return group


def _pages(size: int) -> int:
    return -(-size // PAGE) * PAGE
