from __future__ import annotations

from pathlib import Path

import numpy as np
import openvino as ov
import openvino.opset15 as ops
import pytest

from cpm_edge.exporter.passes.openvino_names import renumber


def save(folder: Path, name: str) -> Path:
    x = ops.parameter([2], ov.Type.f32, name="x")
    total = ops.add(ops.multiply(x, ops.constant(np.float32(3))), ops.constant(np.float32(4)))
    total.set_friendly_name("Add_7")  # a name given by hand that looks like an automatic one
    ov.serialize(ov.Model([total], [x], "sum"), folder / f"{name}.xml", folder / f"{name}.bin")
    return folder / f"{name}.xml"


def test_two_models_of_one_process_get_the_same_bytes(tmp_path: Path) -> None:
    first, second = save(tmp_path, "first"), save(tmp_path, "second")
    assert first.read_bytes() != second.read_bytes()
    for xml in (first, second):
        renumber(xml)
    assert first.read_bytes() == second.read_bytes()
    assert b'name="x"' in first.read_bytes()


def test_the_model_stays_the_same(tmp_path: Path) -> None:
    xml = save(tmp_path, "model")
    renumber(xml)
    nodes = ov.Core().read_model(xml).get_ops()
    assert len({node.get_friendly_name() for node in nodes}) == len(nodes)
    assert ov.Core().compile_model(xml, "CPU")([np.ones(2, np.float32)])[0] == pytest.approx([7, 7])
