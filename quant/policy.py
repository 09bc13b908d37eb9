"""Which tensor gets which scheme."""

from __future__ import annotations

from dataclasses import dataclass, replace
from enum import Enum

from cpm_edge.quant.errors import QuantError
from cpm_edge.quant.formats import Scheme, WeightFormat, fit_group

DEFAULT_GROUP_SIZE = 32


class TensorClass(str, Enum):
    """What a tensor is for.

    ABSORBED is the up-projection of latent attention (kv_b_proj). One half of every head's rows meets the
    query transposed, so groups along its columns would not be groups of that product's sums.
    """

    LINEAR = "linear"
    EMBEDDING = "embedding"
    HEAD = "head"
    ABSORBED = "absorbed"
    NORM = "norm"
    OTHER = "other"


@dataclass(frozen=True)
class Policy:
    """The schemes of a model's matrices.

    Absorbed matrices follow linear layers of floats and have one int8 scale a row otherwise: a scale of a row
    can be taken out of either product. Norm weights always stay fp32. Whatever else is left (OTHER: biases,
    routers, tables) follows the linear layers when those are floats, and stays fp32 when they are integers:
    it is small and sensitive.
    """

    linear: Scheme
    embedding: Scheme
    head: Scheme

    @classmethod
    def for_format(
        cls,
        weight_format: WeightFormat,
        group_size: int | None = None,
        symmetric: bool = True,
        *,
        embedding: WeightFormat | None = None,
        head: WeightFormat | None = None,
        tied: bool = False,
    ) -> Policy:
        """The policy behind one weight format.

        fp32, fp16, bf16 and int8 (one scale per row) hold for every matrix. int4 and ternary hold for the
        linear layers; embedding and head default to int8, which costs little and keeps rare tokens apart.
        The groups of ternary layers are those of the weights (``find_ternary``), so the policy has none.

        Args:
            weight_format: format of the linear layers.
            group_size: columns that share an int4 scale, one of GROUP_SIZES; None is DEFAULT_GROUP_SIZE.
            symmetric: int4 without stored zero points.
            embedding: another format for the embedding.
            head: another format for the output head.
            tied: head and embedding are one tensor; a format given for one then holds for both.

        Raises:
            QuantError: settings that contradict each other, or an unknown group size.
        """
        if tied:
            if embedding is not None and head is not None and embedding is not head:
                raise QuantError(
                    f"head and embedding are one tensor here: expected one format for both, got "
                    f"{embedding.value} for the embedding and {head.value} for the head",
                    hint="give the format for one of them only",
                )
            embedding = head = embedding or head
        few_bits = weight_format in (WeightFormat.INT4, WeightFormat.TERNARY)
        outer = WeightFormat.INT8 if few_bits else weight_format
        formats = (weight_format, embedding or outer, head or outer)
        _check_int4_settings(formats, group_size, symmetric)
        linear, embedded, headed = (_scheme(format_, group_size, symmetric) for format_ in formats)
        return cls(linear=linear, embedding=embedded, head=headed)

    def scheme_for(self, cls: TensorClass, cols: int) -> tuple[Scheme, str | None]:
        """The scheme of one tensor with ``cols`` columns, and a note when its group had to shrink.

        The note reads ``576 columns: group 128 -> 64``.

        Raises:
            QuantError: no group size divides the columns.
        """
        scheme = self._scheme_of(cls)
        if scheme.group_size is None:
            return scheme, None
        size = fit_group(cols, scheme.group_size)
        if size == scheme.group_size:
            return scheme, None
        return replace(scheme, group_size=size), f"{cols} columns: group {scheme.group_size} -> {size}"

    def _scheme_of(self, cls: TensorClass) -> Scheme:
        if cls is TensorClass.LINEAR:
            return self.linear
        if cls is TensorClass.EMBEDDING:
            return self.embedding
        if cls is TensorClass.HEAD:
            return self.head
        if cls in (TensorClass.ABSORBED, TensorClass.OTHER) and self.linear.format.is_float:
            return self.linear
        if cls is TensorClass.ABSORBED:
            return Scheme(WeightFormat.INT8)
        return Scheme(WeightFormat.FP32)


def _check_int4_settings(formats: tuple[WeightFormat, ...], group_size: int | None, symmetric: bool) -> None:
    """Refuse settings that would be ignored, and group sizes that do not exist."""
    if WeightFormat.INT4 in formats:
        if group_size is not None:
            fit_group(group_size, group_size)  # a size divides itself: this only checks that it is offered
        return
    if group_size is not None or not symmetric:
        setting = "asymmetric" if group_size is None else f"group size {group_size}"
        raise QuantError(
            f"{setting} applies to int4, and nothing here is int4 (linear layers are {formats[0].value})",
            hint=f"leave {setting} out, or choose int4",
        )


def _scheme(format_: WeightFormat, group_size: int | None, symmetric: bool) -> Scheme:
    if format_ is WeightFormat.INT4:
        return Scheme(format_, group_size or DEFAULT_GROUP_SIZE, symmetric)
    return Scheme(format_)
