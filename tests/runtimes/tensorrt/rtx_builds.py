"""Builds with the real TensorRT-RTX, in a process of its own: ``python -m tests.runtimes.tensorrt.rtx_builds
FOLDER`` prints a JSON object of what came out of each.
"""

from __future__ import annotations

import dataclasses
import json
import sys
from pathlib import Path
from typing import Any

import onnx
from onnx import TensorProto, helper

from cpm_edge.runtimes.errors import CpmEdgeError
from cpm_edge.runtimes.tensorrt import build as builds
from cpm_edge.runtimes.tensorrt.api import load_api
from cpm_edge.runtimes.tensorrt.build import BuildSpec, build_engine
from cpm_edge.runtimes.tensorrt.memory import Placement
from tests.runtimes.tensorrt.tiny_model import CHUNK, VOCAB, TinyModel

SMS = (86, 89)


def main(root: Path) -> None:
    builds._LEAST_INPUT = 1024
    tiny = saved(root / "tiny", TinyModel(recurrent=True).onnx())
    large = saved(root / "large", TinyModel(recurrent=True, hidden=4096).onnx())
    ids = saved(root / "ids", TinyModel(host_embedding=False).onnx())
    results = {
        "two chips": built(tiny),
        "one chip": built(tiny, sms=(89,)),
        "token ids": built(ids, sms=(89,)),
        "large": built(large),
        "inputs": built(large, placement=Placement.INPUTS),
        "streamed": built(tiny, placement=Placement.STREAMED, sms=(89,)),
        "timings": built(tiny, sms=(89,), timing_cache=root / "timings"),
        "in place": built(saved(root / "in-place", TinyModel("in_place").onnx()), sms=(89,)),
        "orin": built(tiny, sms=(87,)),
        "unknown operator": built(unknown_operator(root), sms=(89,)),
        "shape from position": built(shape_from_position(root), sms=(89,)),
        "another dynamic input": built(dynamic_cache(root), sms=(89,)),
    }
    json.dump(results, sys.stdout)


def saved(folder: Path, model: onnx.ModelProto) -> BuildSpec:
    folder.mkdir()
    path = folder / "model.onnx"
    onnx.save_model(
        model, str(path), save_as_external_data=True, location="model.onnx.data", size_threshold=256
    )
    return BuildSpec(path, CHUNK, VOCAB, workspace=1 << 26, sms=SMS)


def built(spec: BuildSpec, timing_cache: Path | None = None, **changes: Any) -> dict[str, Any]:
    try:
        result = build_engine(
            load_api("tensorrt_rtx"), dataclasses.replace(spec, **changes), timing_cache=timing_cache
        )
    except CpmEdgeError as error:
        return {"error": type(error).__name__, "message": error.message, "hint": error.hint}
    return {"bytes": memoryview(result.plan).nbytes, "weights": [weight.name for weight in result.weights]}


def unknown_operator(root: Path) -> BuildSpec:
    model = TinyModel().onnx()
    node = next(node for node in model.graph.node if node.op_type == "Softmax")
    node.op_type, node.domain = "CpmSparseAttention", "cpm"
    model.opset_import.append(helper.make_opsetid("cpm", 1))
    return saved(root / "unknown", model)


def shape_from_position(root: Path) -> BuildSpec:
    """Range(0, past) in place of data: the position becomes a shape."""
    model = TinyModel().onnx()
    past = helper.make_node("Squeeze", ["past_length"], ["past"])
    zeros = helper.make_node("Range", ["constant_1", "past", "constant_2"], ["so_many"])
    total = helper.make_node("ReduceSum", ["so_many"], ["total"], keepdims=0)
    model.graph.node.extend([past, zeros, total])
    model.graph.output.append(helper.make_tensor_value_info("total", TensorProto.INT32, []))
    return saved(root / "shape", model)


def dynamic_cache(root: Path) -> BuildSpec:
    model = TinyModel("in_place").onnx()
    cache = next(each for each in model.graph.input if each.name == "past_key_values.0.key")
    cache.type.tensor_type.shape.dim[2].dim_param = "C"
    return saved(root / "dynamic", model)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
