"""Plugin nodes of exported graphs in the plugin library, with the kernels that the bundle brings."""

from __future__ import annotations

import json
import platform
import shutil
from pathlib import Path

import onnx_ir as ir
import pytest

from cpm_edge.exporter.cubins.compile import compile_cubins
from cpm_edge.plugins import DOMAIN
from cpm_edge.plugins.kernel_config import KernelConfig
from cpm_edge.plugins.tensorrt_library import library
from tests.exporter.targets.conftest import CONFIGURATIONS, FORMS
from tests.plugins.tensorrt.cases import FLOAT, HALF, INT8, INT32, Tensor
from tests.plugins.tensorrt.harness import (
    INPUTS,
    OUTPUTS,
    STREAM,
    WORKSPACE,
    Device,
    build_tools,
    require_library,
    words,
)
from tests.support.bundles import Bundles

TYPES = {"FLOAT": FLOAT, "FLOAT16": HALF, "INT8": INT8, "INT32": INT32}
ROWS = (1, 50)


@pytest.mark.parametrize(("variant", "weight_format"), [("sparse", "int4"), ("sala", "int8")])
def test_nodes_are_taken_and_launch(
    engines: Bundles, tmp_path: Path, variant: str, weight_format: str
) -> None:
    require_library(platform.machine())
    bundle = engines.open(variant, weight_format=weight_format, **FORMS["native"])
    configs = json.loads(bundle.file(CONFIGURATIONS).read_text())
    (tmp_path / "kernels").mkdir()
    compile_cubins(tmp_path / "kernels", 87, [KernelConfig.from_json(each) for each in configs])
    path = Path(shutil.copy(library(platform.machine()), tmp_path / "libcpm_tensorrt.so"))
    device = Device(build_tools(tmp_path, "g++"), path, tmp_path / "record.json")
    nodes = [node for node in ir.load(bundle.file("model.onnx")).graph if node.domain == DOMAIN]
    assert nodes
    for node in nodes:
        commands = [_create(node, tmp_path), words("shapes", _tensors(node, -1))]
        aliases = device.run(commands[0], "aliases")[1].text.split()
        for rows in ROWS:
            commands += [words("change", _tensors(node, rows)), _enqueue(node, aliases)]
        answers = device.run(*commands)
        assert not any(each.errors for each in answers), node.name
        created, shapes, *codes = (each.text for each in answers)
        assert created == "ok" and len(shapes.split()) == len(node.outputs)
        assert set(codes) == {"0"}
        assert device.calls()


def _create(node: ir.Node, folder: Path) -> str:
    plan = folder / "plan"
    plan.write_text(node.attributes.get_string("plan") or "")
    integers = {each.name: each.as_int() for each in node.attributes.values() if each.type.name == "INT"}
    fields = [f"{name}=i:{value}" for name, value in integers.items()]
    return " ".join(["create", node.op_type, "layer", f"plan=s:{plan}", *fields])


def _tensors(node: ir.Node, rows: int) -> list[Tensor]:
    """Of the inputs: stored ones as the graph states them, activations as the op needs them."""
    stored: dict[int, Tensor] = {}
    for index, value in enumerate(node.inputs):
        assert value is not None
        if value.shape is not None and value.dtype is not None and value.producer() is None:
            shape = tuple(size for size in value.shape if isinstance(size, int))
            assert len(shape) == len(value.shape), value.name
            stored[index] = TYPES[value.dtype.name], shape
    if node.op_type == "CpmMatMulNBits":
        widths = [node.attributes.get_int("k") or 0]
    else:
        _, heads, middle, last = stored[3][1]
        if node.op_type == "CpmSparseAttention":
            widths = [(node.attributes.get_int("num_heads") or 0) * last, heads * last, heads * last]
        else:
            widths = [heads * middle, heads * middle, heads * last]
    activations: dict[int, Tensor] = {i: (HALF, (1, rows, width)) for i, width in enumerate(widths)}
    found = stored | activations
    return [found[index] for index in range(len(node.inputs))]


def _enqueue(node: ir.Node, aliases: list[str]) -> str:
    inputs = [INPUTS + (index << 30) for index in range(len(node.inputs))]
    outputs = [
        OUTPUTS + (index << 30) if alias == "-1" else inputs[int(alias)]
        for index, alias in enumerate(aliases)
    ]
    return " ".join(map(str, ["enqueue", STREAM, WORKSPACE, *inputs, *outputs]))
