"""From a torch model to one ONNX graph without weights.

The three parts of a model are exported one by one on fake tensors: the embedding, one layer of each kind,
and the head. The graph of the whole model calls them in turn and is then inlined, so that the time does not
grow with the number of layers. Weights are initializers with a name, a shape and no data.
"""

from __future__ import annotations

import contextlib
import logging
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import onnx_ir as ir
import torch
from onnx_ir.passes.common import InlinePass, LiftConstantsToInitializersPass
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from cpm_edge.exporter.configs import LlamaConfig
from cpm_edge.exporter.configs.llama import CAPACITY
from cpm_edge.exporter.configs.rope import RopeTable
from cpm_edge.exporter.weights import EMBEDDING, HEAD
from cpm_edge.plugins import DOMAIN, VERSION

OPSET = 23
PARTS = "cpm.parts"
INT64_MAX = 2**63 - 1
_CACHES = 4  # arguments of a layer before its caches


class _Embed(nn.Module):
    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.part = model

    def forward(self, input_ids: Tensor, past_length: Tensor) -> tuple[Tensor, ...]:
        return self.part.embed(input_ids, past_length)  # type: ignore[no-any-return, operator]


class _Layer(nn.Module):
    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.part = layer

    def forward(
        self, hidden: Tensor, cos: Tensor, sin: Tensor, past_length: Tensor, *cache: Tensor
    ) -> tuple[Tensor, ...]:
        output, present = self.part(hidden, (cos, sin), past_length, cache)
        return (output, *present)


class _Head(nn.Module):
    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.part = model

    def forward(self, hidden: Tensor) -> Tensor:
        return self.part.head(hidden)  # type: ignore[no-any-return, operator]


def trace(model_class: type[nn.Module], config: LlamaConfig, rope: RopeTable) -> ir.Model:
    """Trace ``model_class(config, rope)``.

    Returns:
        A model with inputs ``input_ids`` (batch, sequence), ``past_length`` (batch,), ``logits_from`` (1,)
        (the first row that gets logits) and ``past_key_values.N.PORT``; outputs ``logits`` and
        ``present.N.PORT``; initializers named like the checkpoint's tensors, without data, and
        ``rotary.inv_freq``. The ports of a layer are those of ``config.layer_caches``.
    """
    samples = _Samples(config)
    with samples.fake:
        model = model_class(config, rope)
    layers = list(model.model.layers)  # type: ignore[union-attr, arg-type]
    model.model.layers = nn.ModuleList()  # type: ignore[union-attr]
    parts = {
        "embed": _export(_Embed(model), samples.embed(), "embed"),
        "head": _export(_Head(model), samples.head(), "head"),
    }
    for index, layer in enumerate(layers):
        kind = config.layer_kind(index)
        if kind not in parts:
            parts[kind] = _export(_Layer(layer), samples.layer(index), kind)
    return _compose(config, parts)


@dataclass(frozen=True)
class _Sample:
    """A fake input and which of its dimensions vary."""

    tensor: Tensor
    dynamic: tuple[int, ...]


class _Samples:
    """Fake sample inputs; all distinct tensors, every length dynamic."""

    def __init__(self, config: LlamaConfig) -> None:
        self.fake = FakeTensorMode()
        self._config = config

    def _sample(
        self, *shape: int, dynamic: tuple[int, ...] = (0, 1), dtype: torch.dtype = torch.float32
    ) -> _Sample:
        with self.fake:
            return _Sample(torch.empty(*shape, dtype=dtype), dynamic)

    def _past_length(self) -> _Sample:
        return self._sample(2, dynamic=(0,), dtype=torch.int64)

    def embed(self) -> list[_Sample]:
        return [self._sample(2, 3, dtype=torch.int64), self._past_length()]

    def layer(self, index: int) -> list[_Sample]:
        config = self._config
        half = config.rope.head_dim // 2
        hidden, cos, sin = (self._sample(2, 3, size) for size in (config.hidden_size, half, half))
        caches = []
        for shape in config.layer_caches(index).values():
            sizes = [7 if size == CAPACITY else int(size) for size in shape]
            varying = (i + 1 for i, size in enumerate(shape) if size == CAPACITY)
            caches.append(self._sample(2, *sizes, dynamic=(0, *varying)))
        return [hidden, cos, sin, self._past_length(), *caches]

    def head(self) -> list[_Sample]:
        return [self._sample(2, 3, self._config.hidden_size)]


def _export(module: nn.Module, samples: list[_Sample], name: str) -> ir.Function:
    """Export one part as a function whose trailing inputs are its weights."""
    tensors = tuple(sample.tensor for sample in samples)
    dynamic: list[Any] = [dict.fromkeys(sample.dynamic, torch.export.Dim.DYNAMIC) for sample in samples]
    if isinstance(module, _Layer):
        dynamic[_CACHES:] = [tuple(dynamic[_CACHES:])]
    with _quiet_exporter():
        exported = torch.export.export(module, tensors, dynamic_shapes=tuple(dynamic), strict=False)
        program = torch.onnx.export(exported, dynamo=True, opset_version=OPSET, optimize=False, verbose=False)
    assert program is not None
    graph = program.model.graph
    weights = list(graph.initializers.values())
    graph.initializers.clear()
    for weight in weights:
        weight.const_value = None
        graph.inputs.append(weight)
    return ir.Function(PARTS, name, graph=graph, attributes=())


@contextlib.contextmanager
def _quiet_exporter() -> Iterator[None]:
    """The exporter logs about packages that it does not need here."""
    logger = logging.getLogger("torch.onnx")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(level)


class _Composer:
    """Builds the graph of calls: one node a part, weights by their checkpoint names."""

    def __init__(self, parts: dict[str, ir.Function], tied: bool) -> None:
        self.parts = parts
        self.tied = tied
        self.nodes: list[ir.Node] = []
        self.weights: dict[str, ir.Value] = {}

    def call(self, kind: str, prefix: str, inputs: list[ir.Value]) -> list[ir.Value]:
        function = self.parts[kind]
        names = [value.name or "" for value in function.inputs[len(inputs) :]]
        weights = []
        for name, declared in zip(names, function.inputs[len(inputs) :], strict=True):
            full = prefix + name.removeprefix("part.")
            if self.tied and full == HEAD:
                full = EMBEDDING
            if full not in self.weights:
                self.weights[full] = ir.Value(name=full, shape=declared.shape, type=declared.type)
            weights.append(self.weights[full])
        node = ir.Node(PARTS, kind, [*inputs, *weights], num_outputs=len(function.outputs))
        node.name = prefix.rstrip(".") or kind
        self.nodes.append(node)
        return list(node.outputs)


def _compose(config: LlamaConfig, parts: dict[str, ir.Function]) -> ir.Model:
    composer = _Composer(parts, config.tie_word_embeddings)
    input_ids = _input("input_ids", ["batch", "sequence"], ir.DataType.INT64)
    past_length = _input("past_length", ["batch"], ir.DataType.INT64)
    logits_from = _input("logits_from", [1], ir.DataType.INT64)
    inputs, outputs = [input_ids, past_length, logits_from], []
    hidden, cos, sin = composer.call("embed", "", [input_ids, past_length])
    for index in range(config.num_hidden_layers):
        caches = {port: ["batch", *shape] for port, shape in config.layer_caches(index).items()}
        past = [_input(f"past_key_values.{index}.{port}", shape) for port, shape in caches.items()]
        inputs += past
        arguments = [hidden, cos, sin, past_length, *past]
        hidden, *present = composer.call(config.layer_kind(index), f"model.layers.{index}.", arguments)
        for (port, shape), value in zip(caches.items(), present, strict=True):
            outputs.append(_named(value, f"present.{index}.{port}", shape))
    hidden = _rows_from(composer, hidden, logits_from)
    (logits,) = composer.call("head", "", [hidden])
    outputs.insert(0, _named(logits, "logits", ["batch", "rows", config.vocab_size]))
    graph = ir.Graph(
        inputs,
        outputs,
        nodes=composer.nodes,
        initializers=list(composer.weights.values()),
        opset_imports={"": OPSET, DOMAIN: VERSION, PARTS: 1},
        name="cpm_edge",
    )
    model = ir.Model(graph, ir_version=10, producer_name="cpm-edge", functions=list(parts.values()))
    InlinePass()(model)
    LiftConstantsToInitializersPass(lift_all_constants=True, size_limit=0)(model)
    model.functions.clear()
    model.graph.opset_imports.pop(PARTS, None)
    return model


def _rows_from(composer: _Composer, hidden: ir.Value, start: ir.Value) -> ir.Value:
    """Drop the rows that get no logits before the costly head."""
    end = _constant("logits_to", [INT64_MAX], composer)
    axis = _constant("logits_axis", [1], composer)
    node = ir.Node("", "Slice", [hidden, start, end, axis], num_outputs=1, name="logits_rows")
    composer.nodes.append(node)
    return node.outputs[0]


def _constant(name: str, values: list[int], composer: _Composer) -> ir.Value:
    tensor = ir.tensor(values, dtype=ir.DataType.INT64, name=name)
    shape = ir.Shape([len(values)])
    value = ir.Value(name=name, shape=shape, type=ir.TensorType(tensor.dtype), const_value=tensor)
    composer.weights[name] = value
    return value


def _input(name: str, shape: list[Any], dtype: ir.DataType = ir.DataType.FLOAT) -> ir.Value:
    return ir.Value(name=name, shape=ir.Shape(shape), type=ir.TensorType(dtype))


def _named(value: ir.Value, name: str, shape: list[Any]) -> ir.Value:
    value.name, value.shape, value.type = name, ir.Shape(shape), ir.TensorType(ir.DataType.FLOAT)
    return value
