"""Weights of an OpenVINO model: decompression subgraphs over parameters that stand for the data.

The parameters become constants in the serialized IR (openvino_constants), so the data is never in memory.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from itertools import chain
from typing import Any

import numpy as np
import numpy.typing as npt

from cpm_edge.exporter.weights import ModelWeights
from cpm_edge.quant import (
    Scheme,
    WeightFormat,
    openvino_i4,
    openvino_i8,
    openvino_u2,
    openvino_u4,
    ternary_as_int4,
)

Rows = npt.NDArray[Any]

_FLOAT = {WeightFormat.FP32: "f32", WeightFormat.FP16: "f16", WeightFormat.BF16: "bf16"}
CODES, SCALES, ZEROS = ".codes", ".scales", ".zeros"


@dataclass
class OpenVinoWeights:
    """Replaces weight parameters of ``model`` and then yields their data.

    Attributes:
        model: OpenVINO model with a float32 parameter for each weight or stack of weights.
        stacks: tensors of one shape and format that are one constant, by its name.
        placeholders: the parameters that stand for constants, by name.
    """

    model: Any
    weights: ModelWeights
    stacks: Mapping[str, list[str]] = field(default_factory=dict)
    placeholders: set[str] = field(default_factory=set)

    def replace_parameters(self) -> None:
        """Put each weight's stored form and its decompression in place of the float32 parameter."""
        for parameter in list(self.model.get_parameters()):
            name = parameter.get_friendly_name()
            if name not in self.weights.shapes and name not in self.stacks:
                continue
            users = list(parameter.output(0).get_target_inputs())
            value = self._decompressed(name)
            for user in users:
                user.replace_source_output(value.output(0))
            self.model.remove_parameter(parameter)
        _fold_transposes(self.model)

    def data(self, name: str) -> Iterator[tuple[str, Iterator[Rows]]]:
        """(placeholder name, row blocks) of one weight, in writing order; a stack with its first tensor."""
        name, tensors = self._stack_of(name)
        if not tensors:
            return
        scheme = self._scheme(name)
        if scheme.format.is_float:
            yield name, chain.from_iterable(map(self.weights.stored, tensors))
            return
        scales: list[Rows] = []
        zeros: list[Rows] = []
        yield name + CODES, self._codes(tensors, scheme, scales, zeros)
        scale_type = np.float32 if scheme.wide_scales else np.float16
        yield name + SCALES, iter([np.concatenate(scales).astype(scale_type)])
        if zeros:
            yield name + ZEROS, iter(zeros)

    def _stack_of(self, name: str) -> tuple[str, list[str]]:
        """The constant that a tensor belongs to, and what to write with it: all with the first of a stack."""
        for stack, tensors in self.stacks.items():
            if name in tensors:
                return stack, tensors if name == tensors[0] else []
        return name, [name]

    def _scheme(self, name: str) -> Scheme:
        """How a constant is stored; the tensors of a stack share the smallest group that one of them has."""
        schemes = [self.weights.scheme(tensor) for tensor in self.stacks.get(name, [name])]
        groups = [scheme.group_size for scheme in schemes if scheme.group_size is not None]
        wide = any(scheme.wide_scales for scheme in schemes)
        return replace(schemes[0], group_size=min(groups, default=None), wide_scales=wide)

    def _codes(
        self, tensors: list[str], scheme: Scheme, scales: list[Rows], zeros: list[Rows]
    ) -> Iterator[Rows]:
        for quantized in chain.from_iterable(map(self.weights.quantized, tensors)):
            repeat = scheme.groups(quantized.codes.shape[1]) // quantized.scales.shape[1]
            scales.append(np.repeat(quantized.scales, repeat, axis=1))
            if scheme.format is WeightFormat.INT8:
                yield openvino_i8(quantized)
            elif scheme.format is WeightFormat.TERNARY:
                yield openvino_u2(quantized) if len(tensors) == 1 else openvino_i4(ternary_as_int4(quantized))
            elif scheme.symmetric:
                yield openvino_i4(quantized)
            else:
                codes, packed_zeros = openvino_u4(quantized)
                zeros.append(packed_zeros)
                yield codes

    def _placeholder(self, name: str, shape: list[int], element_type: str) -> Any:
        import openvino.opset15 as ops
        from openvino import PartialShape, Type

        parameter = ops.parameter(PartialShape(shape), getattr(Type, element_type), name=name)
        self.model.add_parameters([parameter])
        self.placeholders.add(name)
        return parameter

    def _decompressed(self, name: str) -> Any:
        import openvino.opset15 as ops

        scheme, stack = self._scheme(name), self.stacks.get(name, [])
        shape = [*([len(stack)] if stack else []), *self.weights.shapes[stack[0] if stack else name]]
        if scheme.format.is_float:
            stored = self._placeholder(name, shape, _FLOAT[scheme.format])
            return stored if scheme.format is WeightFormat.FP32 else _marked(ops.convert(stored, "f32"))
        *rows, cols = shape
        grouped = scheme.group_size is not None and scheme.group_size < cols
        groups = scheme.groups(cols)
        packed_shape = [*rows, groups, cols // groups] if grouped else shape
        scale_shape = [*rows, groups, 1] if grouped else [*rows, 1]
        # The plugins multiply with chosen experts of 4 and 8 bits.
        kind = "i4" if stack and scheme.format is WeightFormat.TERNARY else _element_type(scheme)
        precision = "f32" if scheme.wide_scales else "f16"
        value = ops.convert(self._placeholder(name + CODES, packed_shape, kind), precision)
        if not scheme.symmetric:
            zeros = ops.convert(self._placeholder(name + ZEROS, scale_shape, kind), precision)
            value = ops.subtract(value, zeros)
        elif kind == "u2":
            one = np.ones([1] * len(packed_shape), np.float32 if scheme.wide_scales else np.float16)
            value = ops.subtract(value, ops.constant(one))
        value = ops.multiply(value, self._placeholder(name + SCALES, scale_shape, precision))
        if grouped:
            value = ops.reshape(value, ops.constant(np.array(shape)), special_zero=False)
        return value if scheme.wide_scales else ops.convert(value, "f32")


def _element_type(scheme: Scheme) -> str:
    """Of a constant that holds codes."""
    if scheme.format is WeightFormat.TERNARY:
        return "u2"
    if scheme.format is WeightFormat.INT8:
        return "i8"
    return "i4" if scheme.symmetric else "u4"


def _marked(convert: Any) -> Any:
    """Mark a Convert as decompression, so that compilation keeps the small constant."""
    convert.get_rt_info()["decompression"] = True
    return convert


def _fold_transposes(model: Any) -> None:
    """MatMul(x, Transpose(w)) to MatMul(x, w, transpose_b): the form the plugins match."""
    import openvino.opset15 as ops

    for node in [n for n in model.get_ops() if n.get_type_name() == "MatMul"]:
        transpose = node.input_value(1).get_node()
        if transpose.get_type_name() != "Transpose" or node.get_attributes()["transpose_b"]:
            continue
        if list(transpose.input_value(1).get_node().get_data()) != [1, 0]:
            continue
        product = ops.matmul(node.input_value(0), transpose.input_value(0), False, True)
        product.set_friendly_name(node.get_friendly_name())
        names = node.output(0).get_names()
        for user in list(node.output(0).get_target_inputs()):
            user.replace_source_output(product.output(0))
        product.output(0).set_names(names)
