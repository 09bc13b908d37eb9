"""Initializers of an ONNX file turned into graph inputs, on the protobuf bytes themselves.

A device has no ``onnx`` package. Only what is needed of the format is read (field numbers of onnx.proto:
ModelProto.graph 7; GraphProto node 1, initializer 5, input 11; NodeProto input 1, op_type 4, domain 7;
TensorProto dims 1, data_type 2, name 8, external_data 13); every other byte is taken over as it stands.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

from cpm_edge.runtimes.errors import BundleError

_GRAPH = 7
_NODE, _INITIALIZER, _INPUT = 1, 5, 11
_VARINT, _FIXED64, _BYTES, _FIXED32 = 0, 1, 2, 5
_FIXED = {_FIXED64: 8, _FIXED32: 4}
# Bits of an element by TensorProto.DataType: FLOAT, UINT8, INT8, INT32, INT64, FLOAT16, BFLOAT16, INT4.
_BITS = {1: 32, 2: 8, 3: 8, 6: 32, 7: 64, 10: 16, 16: 16, 22: 4}


@dataclass(frozen=True)
class ExternalTensor:
    """An initializer whose data lies in another file.

    Attributes:
        data_type: TensorProto.DataType; location: path relative to the model.
        offset, nbytes: where in that file.
    """

    name: str
    data_type: int
    dims: tuple[int, ...]
    location: str
    offset: int
    nbytes: int


@dataclass(frozen=True)
class Use:
    """One input of one node: the operator, its domain, the input's index and the value's name."""

    op_type: str
    domain: str
    index: int
    name: str


Field = tuple[int, int, bytes, bytes]  # number, wire type, payload, all bytes of the field


def external_tensors(model: bytes) -> list[ExternalTensor]:
    """All initializers with external data, in file order.

    Raises:
        BundleError: the bytes are not an ONNX model.
    """
    graph = _only_graph(model)
    tensors = (_external(payload) for number, _, payload, _ in _fields(graph) if number == _INITIALIZER)
    return [tensor for tensor in tensors if tensor is not None]


def uses(model: bytes) -> list[Use]:
    """All inputs of all nodes of the main graph."""
    found = []
    for number, _, payload, _ in _fields(_only_graph(model)):
        if number == _NODE:
            node = list(_fields(payload))
            texts = {n: body.decode() for n, _, body, _ in node if n in (4, 7)}
            names = [body.decode() for n, _, body, _ in node if n == 1]
            found += [Use(texts.get(4, ""), texts.get(7, ""), i, name) for i, name in enumerate(names)]
    return found


def with_inputs(model: bytes, chosen: Callable[[str], bool]) -> bytes:
    """The model without the initializers whose name is chosen; each is a graph input of the same name."""
    out = bytearray()
    for number, _, payload, whole in _fields(model):
        out += _block(_GRAPH, _rewritten(payload, chosen)) if number == _GRAPH else whole
    return bytes(out)


def _rewritten(graph: bytes, chosen: Callable[[str], bool]) -> bytes:
    out, inputs = bytearray(), bytearray()
    for number, _, payload, whole in _fields(graph):
        tensor = _external(payload) if number == _INITIALIZER else None
        if tensor is not None and chosen(tensor.name):
            inputs += _block(_INPUT, _value_info(tensor))
        else:
            out += whole
    return bytes(out + inputs)


def _value_info(tensor: ExternalTensor) -> bytes:
    # ValueInfoProto.type.tensor_type: elem_type 1, shape 2, whose dims 1 have dim_value 1.
    shape = b"".join(_block(1, _integer(1, dim)) for dim in tensor.dims)
    tensor_type = _integer(1, tensor.data_type) + _block(2, shape)
    return _block(1, tensor.name.encode()) + _block(2, _block(1, tensor_type))


def _external(tensor: bytes) -> ExternalTensor | None:
    dims: list[int] = []
    data_type, name = 0, ""
    entries: dict[str, str] = {}
    for number, wire, payload, _ in _fields(tensor):
        if number == 1:
            dims += [_varint(payload, 0)[0]] if wire == _VARINT else _packed(payload)
        elif number == 2:
            data_type = _varint(payload, 0)[0]
        elif number == 8:
            name = payload.decode()
        elif number == 13:
            pair = {n: body.decode() for n, _, body, _ in _fields(payload)}
            entries[pair.get(1, "")] = pair.get(2, "")
    if "location" not in entries or data_type not in _BITS:
        return None
    count = 1
    for dim in dims:
        count *= dim
    nbytes = int(entries.get("length") or -(-count * _BITS[data_type] // 8))
    offset = int(entries.get("offset") or 0)
    return ExternalTensor(name, data_type, tuple(dims), entries["location"], offset, nbytes)


def _only_graph(model: bytes) -> bytes:
    graphs = [payload for number, _, payload, _ in _fields(model) if number == _GRAPH]
    if len(graphs) != 1:
        raise BundleError(f"the ONNX model: expected one graph, found {len(graphs)}")
    return graphs[0]


def _fields(message: bytes) -> Iterator[Field]:
    position = 0
    try:
        while position < len(message):
            start = position
            key, position = _varint(message, position)
            number, wire = key >> 3, key & 7
            body = position
            if wire == _VARINT:
                _, position = _varint(message, position)
            elif wire == _BYTES:
                length, body = _varint(message, position)
                position = body + length
            else:
                position += _FIXED[wire]
            if position > len(message):
                raise IndexError
            yield number, wire, message[body:position], message[start:position]
    except (IndexError, KeyError) as error:
        raise BundleError(f"the ONNX model is damaged near byte {position}") from error


def _varint(data: bytes, position: int) -> tuple[int, int]:
    value = shift = 0
    while True:
        byte = data[position]
        value |= (byte & 0x7F) << shift
        position, shift = position + 1, shift + 7
        if byte < 0x80:
            return value, position


def _packed(data: bytes) -> list[int]:
    values, position = [], 0
    while position < len(data):
        value, position = _varint(data, position)
        values.append(value)
    return values


def _encode(value: int) -> bytes:
    out = bytearray()
    while value > 0x7F:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    return bytes(out) + bytes([value])


def _integer(number: int, value: int) -> bytes:
    return _encode(number << 3 | _VARINT) + _encode(value)


def _block(number: int, payload: bytes) -> bytes:
    return _encode(number << 3 | _BYTES) + _encode(len(payload)) + payload
