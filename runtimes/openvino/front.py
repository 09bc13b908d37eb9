"""What a decode step of the native graph reads: the token's embedding and the rotary tables of its position.

OpenVINO takes longer for one row of them than for a layer. So the embedding's row is computed in numpy, and
the tables, which depend on the position alone, many positions at a time.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from cpm_edge.runtimes.errors import BundleError
from cpm_edge.runtimes.session import FloatArray

if TYPE_CHECKING:
    import openvino as ov

POSITIONS = 64  # that one run of the rotary graph computes
_STORED = ("f32", "f16", "bf16", "i8")  # types of an embedding's constants


class Embedding:
    """One row of the graph's embedding, float32 (n,), from the nodes that compute it.

    Args:
        output: what the first layer reads.

    Raises:
        BundleError: nodes other than those of a table, its scales and a factor.
    """

    def __init__(self, output: ov.Output) -> None:
        node = output.get_node()
        self.factor = np.float32(1)
        while node.get_type_name() == "Multiply":
            sides = [node.input_value(index).get_node() for index in (0, 1)]
            constant = next((side for side in sides if side.get_type_name() == "Constant"), None)
            if constant is None or constant.data.size != 1:
                raise _unknown(node)
            self.factor *= constant.data.reshape(-1)[0].astype(np.float32)
            node = sides[0] if sides[1] is constant else sides[1]
        if node.get_type_name() != "Gather":
            raise _unknown(node)
        tables = _tables(node.input_value(0).get_node())
        self._tables = sorted(tables, key=lambda table: -table.shape[-1])  # scales behind what they scale

    def row(self, token: int) -> FloatArray:
        """The embedding of a token."""
        row = _floats(self._tables[0][token])
        for table in self._tables[1:]:
            row *= _floats(table[token])
        row *= self.factor
        return row


def _tables(node: ov.Node) -> list[npt.NDArray[Any]]:
    """The constants whose product is the table: codes and the scales of their rows, or floats alone."""
    kind = node.get_type_name()
    if kind == "Constant" and node.get_element_type().to_string() in _STORED:
        # numpy has no bfloat16, and OpenVINO hands its bits over as another type.
        is_bfloat = node.get_element_type().to_string() == "bf16"
        return [node.data.view(np.uint16) if is_bfloat else node.data]
    if kind == "Convert":
        return _tables(node.input_value(0).get_node())
    if kind == "Multiply":
        return [table for index in (0, 1) for table in _tables(node.input_value(index).get_node())]
    raise _unknown(node)


def _floats(row: npt.NDArray[Any]) -> FloatArray:
    """A row in float32, a new array; uint16 are the bits of bfloat16."""
    if row.dtype == np.uint16:
        return (row.astype(np.uint32) << 16).view(np.float32)
    widened: FloatArray = row.astype(np.float32)
    return widened


def _unknown(node: ov.Node) -> BundleError:
    return BundleError(
        "embedding: expected a table, scales and a factor, "
        f"got {node.get_type_name()} {node.get_friendly_name()}",
        hint="Export the bundle again with this version of cpm-edge.",
    )


def reads_token(output: ov.Output) -> bool:
    """Whether a value depends on which token it is, and not on the position alone."""
    node = output.get_node()
    if node.get_type_name() in ("ShapeOf", "Constant"):
        return False
    if node.get_type_name() == "Parameter":
        return str(node.get_friendly_name()) == "input_ids"
    return any(reads_token(node.input_value(index)) for index in range(node.get_input_size()))


class RotaryTables:
    """The tables of one session's position, computed ahead.

    Args:
        compiled: maps past_length to tables (1, POSITIONS, n) of the positions from there on.
        places: for each of its outputs, offset and floats in the values of the decode program.
    """

    def __init__(self, compiled: ov.CompiledModel, places: list[tuple[int, int]]) -> None:
        self._request = compiled.create_infer_request()
        self._names = [port.get_any_name() for port in compiled.inputs]
        self._places = places
        self._first = -POSITIONS
        self._tables: list[FloatArray] = []

    def write(self, position: int, values: FloatArray) -> None:
        """Put the rows of a position where the program reads them."""
        if not 0 <= position - self._first < POSITIONS:
            self._compute(position)
        for table, (offset, floats) in zip(self._tables, self._places, strict=True):
            values[offset : offset + floats] = table[position - self._first]

    def _compute(self, first: int) -> None:
        inputs = {"input_ids": np.zeros((1, POSITIONS), np.int64), "past_length": np.array([first], np.int64)}
        self._request.infer({name: inputs[name] for name in self._names})
        outputs = range(len(self._places))
        self._tables = [self._request.get_output_tensor(index).data[0].copy() for index in outputs]
        self._first = first
