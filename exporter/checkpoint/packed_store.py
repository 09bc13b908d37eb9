"""A GPTQ or AWQ checkpoint seen as its matrices: ``X.weight`` in place of ``X.qweight``, ``X.scales`` ..."""

from __future__ import annotations

from collections.abc import Mapping

from cpm_edge.exporter.checkpoint.integers import Integers, dequantized
from cpm_edge.exporter.checkpoint.packed_tensor import PackedParts, PackedTensor, find_parts
from cpm_edge.exporter.checkpoint.quantization import Quantization
from cpm_edge.exporter.checkpoint.tensors import FloatRows, PlainStore, RawRows, TensorInfo
from cpm_edge.exporter.errors import CheckpointError

CODES = (".qweight", ".B")
PARTS = (".qweight", ".qzeros", ".scales", ".g_idx", ".B", ".s", ".workspace")
FUSED = ("qkv_proj", "gate_up_proj")


class PackedStore:
    """The stored tensors with every packed matrix under its plain name.

    Args:
        plain: the tensors as stored.
        quantization: what config.json says; None for a checkpoint that should have no packed tensors.

    Raises:
        CheckpointError: packed tensors without a quantization_config, or parts that do not fit each other.
    """

    def __init__(self, plain: PlainStore, quantization: Quantization | None) -> None:
        self._plain = plain
        self._quantization = quantization
        self.files = plain.files
        self._parts: dict[str, PackedParts] = {}
        self._last: tuple[str, PackedTensor] | None = None
        tensors: dict[str, TensorInfo] = {}
        for name, info in plain.tensors.items():
            if name.endswith(CODES):
                weight, parts = self._find(name)
                self._parts[weight] = parts
                tensors[weight] = TensorInfo(weight, parts.shape, parts.layout.name)
            elif not name.endswith(PARTS):
                tensors[name] = info
        self._refuse_loose_parts()
        self.tensors: Mapping[str, TensorInfo] = tensors
        self.packed: Mapping[str, str] = {name: parts.layout.name for name, parts in self._parts.items()}

    def integers(self, name: str) -> Integers:
        """The integers of a packed matrix; those of the last one asked for are kept."""
        assert self._quantization is not None
        if self._last is None or self._last[0] != name:
            self._last = (name, PackedTensor(self._plain, self._parts[name], self._quantization))
        return self._last[1]

    def read(self, name: str, start: int, stop: int) -> FloatRows:
        """Rows ``[start, stop)`` as float32."""
        if name in self._parts:
            return dequantized(self.integers(name), start, stop)
        return self._plain.read(name, start, stop)

    def read_raw(self, name: str, start: int, stop: int) -> RawRows:
        """Rows ``[start, stop)`` of a tensor that is not packed.

        Raises:
            CheckpointError: it is.
        """
        if name in self._parts:
            raise CheckpointError(f"{name} is stored as packed {self.packed[name]} codes and has no raw rows")
        return self._plain.read_raw(name, start, stop)

    def close(self) -> None:
        """Close the files."""
        self._plain.close()

    def _find(self, codes: str) -> tuple[str, PackedParts]:
        if self._quantization is None:
            raise CheckpointError(
                f"tensor {codes}: the weights are quantized and config.json has no quantization_config",
                hint="copy config.json (and quantize_config.json, if there is one) of the same checkpoint",
            )
        module = codes.rpartition(".")[0]
        if module.rpartition(".")[2] in FUSED:
            raise CheckpointError(
                f"tensor {codes}: holds several layers fused for one runtime (CPM.cu)",
                hint="export the GPTQ checkpoint that it was converted from",
            )
        weight = f"{module}.weight"
        if weight in self._plain.tensors:
            raise CheckpointError(f"tensor {weight} is there, and {codes} too: expected one of them")
        return weight, find_parts(codes, self._plain.tensors, self._quantization)

    def _refuse_loose_parts(self) -> None:
        modules = {name.removesuffix(".weight") for name in self._parts}
        for name in self._plain.tensors:
            if name.endswith(PARTS) and name.rpartition(".")[0] not in modules:
                raise CheckpointError(f"tensor {name}: part of a quantized matrix whose codes are missing")
