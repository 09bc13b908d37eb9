"""The decode step of the native graph as one program of the kernels, with nothing between two ops."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from cpm_edge.plugins.linear_attention.recurrent import CRecurrentRows
from cpm_edge.plugins.matmul_nbits.native import c_shape, panel_bytes
from cpm_edge.plugins.matmul_nbits.spec import NBitsShape
from cpm_edge.plugins.mixture_of_experts.native import CExperts
from cpm_edge.plugins.native import pointer
from cpm_edge.plugins.program import ABSENT, RESULT, Norm, Program, Values
from cpm_edge.plugins.sparse_attention.native import CAttentionSpec
from cpm_edge.plugins.sparse_attention.native_latent import CLatentRows, CLatentSpec
from cpm_edge.plugins.sparse_mlp.native import CSparseMlpWeights
from cpm_edge.plugins.sparse_mlp.spec import slice_bytes, slice_count, strip_bytes
from cpm_edge.runtimes.errors import BundleError
from cpm_edge.runtimes.openvino.front import POSITIONS, Embedding, reads_token

if TYPE_CHECKING:
    import openvino as ov

_REEXPORT = "Export the bundle again with this version of cpm-edge."


class DecodeStep:
    """One token through the native graph.

    Args:
        model: with static shapes for one token; its constants must stay as they are.

    Attributes:
        program: from the embedding to the logits.
        values: the program's activations.
        embedding: of a token.
        place: where the program expects it, offset and floats.
        rotary: the graph of the rotary tables; None for a model without.
        rotary_places: where the program expects its outputs.
        vocab_size: floats that the program leaves as its result.

    Raises:
        BundleError: the graph is not one of ours.
    """

    def __init__(self, model: ov.Model) -> None:
        import openvino
        import openvino.opset15 as ops

        self.program = Program()
        self.values = Values()
        self.rotary: ov.Model | None = None
        self.rotary_places: list[tuple[int, int]] = []
        self._at: dict[str, tuple[int, int]] = {}  # values by the unique name of their node
        self._tables: list[ov.Output] = []
        self._weights = model  # whose constants the program reads in place
        nodes = _program_nodes(model)
        head = _source(model.get_results()[0], 0).get_node()
        if head.get_name() not in {node.get_name() for node in nodes}:
            kind, name = head.get_type_name(), head.get_friendly_name()
            raise BundleError(f"logits: expected a native op, got {kind} {name}", hint=_REEXPORT)
        last_use = self._last_uses(nodes)
        for index, node in enumerate(nodes):
            width = _width(node.output(0))
            offset = RESULT if node.get_name() == head.get_name() else self.values.take(width)
            self._at[node.get_name()] = (offset, width)
            _OPS[node.get_type_name()](self, node, node.get_attributes())
            for name in [name for name, last in last_use.items() if last == index]:
                self.values.give_back(*self._at[name])
        self.vocab_size = _width(head.output(0))
        if self._tables:
            inputs = [p for p in model.get_parameters() if p.get_friendly_name() != "session"]
            self.rotary = openvino.Model([ops.result(table) for table in self._tables], inputs, "rotary")
            self.rotary.reshape({"input_ids": [1, POSITIONS], "past_length": [1]})

    def _last_uses(self, nodes: list[ov.Node]) -> dict[str, int]:
        """For each value that an op computes, the last op that reads it."""
        own = {node.get_name() for node in nodes}
        last: dict[str, int] = {}
        for index, node in enumerate(nodes):
            for place in range(node.get_input_size()):
                name = _source(node, place).get_node().get_name()
                if name in own:
                    last[name] = index
        return last

    def _value(self, node: ov.Node, index: int) -> tuple[int, int]:
        """Offset and floats of an input; what no op computes is the embedding or a rotary table."""
        source = _source(node, index)
        name = source.get_node().get_name()
        if name not in self._at:
            width = _width(source)
            self._at[name] = (self.values.fresh(width), width)  # no earlier op may write there
            if reads_token(source):
                self.embedding, self.place = Embedding(source), self._at[name]
            else:
                self._tables.append(source)
                self.rotary_places.append(self._at[name])
        return self._at[name]

    def _offset(self, node: ov.Node, index: int, floats: int) -> int:
        """Of an input that the op expects to have so many floats."""
        offset, width = self._value(node, index)
        if width != floats:
            raise _unfit(node, index, f"{floats} floats", f"{width}")
        return offset

    def _rotation(self, node: ov.Node, first: int, size: int) -> tuple[int, int]:
        """Cosines and sines for heads of ``size``."""
        return self._offset(node, first, size // 2), self._offset(node, first + 1, size // 2)

    def _y(self, node: ov.Node) -> int:
        return self._at[node.get_name()][0]

    def _norm(self, node: ov.Node, attributes: dict[str, Any]) -> Norm:
        offset, width = self._value(node, 0)
        weight = _constant(node, 1, np.float32, width)
        return Norm(offset, weight, attributes["epsilon"], attributes.get("scale", 1.0))

    def _norm_linear(self, node: ov.Node, attributes: dict[str, Any]) -> None:
        shape = _shape(node, attributes)
        self.program.norm_linear(self._norm(node, attributes), shape, _panels(node, 2, shape), self._y(node))

    def _linear_add(self, node: ov.Node, attributes: dict[str, Any]) -> None:
        shape = _shape(node, attributes)
        x, residual = self._offset(node, 0, shape.cols), self._offset(node, 1, shape.rows)
        panels = _panels(node, 2, shape)
        self.program.linear_add(x, residual, attributes["scale"], shape, panels, self._y(node))

    def _norm_gated(self, node: ov.Node, attributes: dict[str, Any]) -> None:
        shape = _shape(node, attributes)
        gate, up = _panels(node, 2, shape), _panels(node, 3, shape)
        self.program.norm_gated(self._norm(node, attributes), shape, gate, up, self._y(node))

    def _norm_experts(self, node: ov.Node, attributes: dict[str, Any]) -> None:
        inner = _shape(node, attributes)
        outer = NBitsShape(inner.cols, inner.rows, inner.bits, inner.group, inner.symmetric)
        count = node.input_value(2).get_shape()[0]
        router = _constant(node, 2, np.float32, count * inner.cols)
        panels = [_panels(node, 3 + i, shape, count) for i, shape in enumerate((inner, inner, outer))]
        experts = CExperts(
            count,
            attributes["top_k"],
            c_shape(inner),
            c_shape(outer),
            *(pointer(part, np.uint8) for part in panels),
            pointer(router, np.float32),
        )
        norm = self._norm(node, {"epsilon": attributes["epsilon"]})
        self.program.norm_experts(norm, experts, attributes["scale"], self._y(node), keep=(panels, router))

    def _norm_sparse_mlp(self, node: ov.Node, attributes: dict[str, Any]) -> None:
        up = _shape(node, attributes)
        down = NBitsShape(up.cols, up.rows, up.bits, up.group, up.symmetric)
        sizes = (panel_bytes(up), up.rows * strip_bytes(up), slice_count(down) * slice_bytes(down))
        parts = [_constant(node, 3 + i, np.uint8, size) for i, size in enumerate(sizes)]
        weights = CSparseMlpWeights(
            *(c_shape(shape) for shape in (up, up, down)),
            *(pointer(part, np.uint8) for part in parts),
            attributes["threshold"],
        )
        norm = self._norm(node, {"epsilon": attributes["epsilon"]})
        residual, scale = self._offset(node, 2, down.rows), attributes["scale"]
        self.program.norm_sparse_mlp(norm, weights, residual, scale, self._y(node), keep=parts)

    def _gather(self, node: ov.Node, attributes: dict[str, Any]) -> None:
        width = _width(node.output(0))
        columns = _constant(node, 1, np.int32, width)
        offset, found = self._value(node, 0)
        if columns.min() < 0 or columns.max() >= found:
            raise _unfit(node, 1, f"columns in [0, {found})", f"{columns.min()} to {columns.max()}")
        self.program.gather(offset, columns, self._y(node))

    def _attention(self, node: ov.Node, attributes: dict[str, Any]) -> None:
        layer, gated = attributes.pop("layer"), bool(attributes.pop("gated"))
        qkv, width = self._value(node, 0)
        heads = attributes["num_heads"] * (1 + gated) + 2 * attributes["kv_num_heads"]
        spec = CAttentionSpec(head_size=width // heads, **attributes)
        rotated = node.get_input_size() == 5
        rotation = self._rotation(node, 1, spec.head_size) if rotated else (ABSENT, ABSENT)
        self.program.attention(layer, spec, qkv, rotation, self._y(node), gated=gated)

    def _recurrent(self, node: ov.Node, attributes: dict[str, Any]) -> None:
        mixed, width = self._value(node, 0)
        heads = node.input_value(6).get_shape()[0]
        size = width // 4 // heads
        constants = [
            _constant(node, index, np.float32, floats)
            for index, floats in ((1, size), (2, size), (3, heads * size), (6, heads))
        ]
        names = ("query_norm", "key_norm", "output_norm", "decay")
        addresses = {name: pointer(array, np.float32) for name, array in zip(names, constants, strict=True)}
        scalars = {name: attributes[name] for name in ("scale", "epsilon")}
        rows = CRecurrentRows(heads=heads, size=size, **scalars, **addresses)
        rotation = self._rotation(node, 4, size)
        self.program.recurrent(attributes["layer"], rows, mixed, rotation, self._y(node), keep=constants)

    def _latent(self, node: ov.Node, attributes: dict[str, Any]) -> None:
        layer = attributes.pop("layer")
        spec = CLatentSpec(**attributes)
        up_rows = spec.num_heads * (spec.nope_size + spec.value_size)
        norm = _constant(node, 2, np.float32, spec.rank)
        up = _constant(node, 5, np.uint8, up_rows * (4 * spec.groups + spec.rank))
        address = up.ctypes.data
        rows = CLatentRows(
            norm=pointer(norm, np.float32), scales=address, codes=address + 4 * up_rows * spec.groups
        )
        query = self._offset(node, 0, spec.num_heads * (spec.nope_size + spec.rope_size))
        places = (query, self._offset(node, 1, spec.rank + spec.rope_size))
        rotation = self._rotation(node, 3, spec.rope_size)
        self.program.latent(layer, spec, rows, places, rotation, self._y(node), keep=(norm, up))


_OPS: dict[str, Callable[[DecodeStep, Any, dict[str, Any]], None]] = {
    "NormLinear": DecodeStep._norm_linear,
    "LinearAdd": DecodeStep._linear_add,
    "NormGated": DecodeStep._norm_gated,
    "NormExperts": DecodeStep._norm_experts,
    "NormSparseMlp": DecodeStep._norm_sparse_mlp,
    "Gather": DecodeStep._gather,
    "CachedAttention": DecodeStep._attention,
    "RecurrentAttention": DecodeStep._recurrent,
    "LatentAttention": DecodeStep._latent,
}


def _program_nodes(model: ov.Model) -> list[ov.Node]:
    """Our ops and what lies between them: columns in another order, before weights of another order."""
    found = []
    for node in model.get_ordered_ops():
        ours = node.get_type_info().version_id == "cpm"
        if ours or (node.get_type_name() == "Gather" and _sorts_columns(node)):
            found.append(node)
    return found


def _sorts_columns(gather: ov.Node) -> bool:
    data, columns = (gather.input_value(index).get_node().get_type_name() for index in (0, 1))
    return bool(data != "Constant" and columns == "Constant")


def _source(node: ov.Node, index: int) -> ov.Output:
    """What an input reads; choosing the rows whose logits are wanted changes nothing for a single one."""
    source = node.input_value(index)
    if source.get_node().get_friendly_name() == "logits_rows":
        return source.get_node().input_value(0)
    return source


def _width(output: ov.Output) -> int:
    return int(output.get_partial_shape()[-1].get_length())


def _shape(node: ov.Node, attributes: dict[str, Any]) -> NBitsShape:
    cols = _width(node.input_value(0))
    described = (attributes["rows"], cols, attributes["bits"], attributes["group"])
    return NBitsShape(*described, symmetric=bool(attributes["symmetric"]))


def _constant(node: ov.Node, index: int, dtype: npt.DTypeLike, size: int) -> npt.NDArray[Any]:
    """An input's constant, in place, flat.

    Raises:
        BundleError: it is none, or of another type or size.
    """
    found = _data(node.input_value(index).get_node())
    if found is None or found.dtype != np.dtype(dtype) or found.size != size:
        got = "no constant" if found is None else f"{found.size} of {found.dtype}"
        raise _unfit(node, index, f"{size} of {np.dtype(dtype)}", got)
    flat: npt.NDArray[Any] = found.reshape(-1)
    return flat


def _unfit(node: ov.Node, index: int, expected: str, got: str) -> BundleError:
    return BundleError(
        f"{node.get_friendly_name()}, input {index}: expected {expected}, got {got}", hint=_REEXPORT
    )


def _data(source: ov.Node) -> npt.NDArray[Any] | None:
    if source.get_type_name() == "Constant":
        data: npt.NDArray[Any] = source.data
        return data
    if source.get_type_name() == "Gather":
        rows, columns = (_data(source.input_value(index).get_node()) for index in (0, 1))
        return None if rows is None or columns is None else rows[columns]
    return None


def _panels(node: ov.Node, index: int, shape: NBitsShape, count: int = 1) -> npt.NDArray[np.uint8]:
    return _constant(node, index, np.uint8, count * panel_bytes(shape))
