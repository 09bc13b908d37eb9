"""Plugins as TensorRT sees them when it builds and reads engines."""

from __future__ import annotations

import json

import pytest

from cpm_edge.plugins.tensorrt_library import NAMESPACE, PLUGIN_VERSION
from tests.plugins.tensorrt.cases import CASES, Case
from tests.plugins.tensorrt.harness import Device, Fields, words

LINEAR = 0  # nvinfer1::TensorFormat
each_case = pytest.mark.parametrize("case", CASES, ids=str)
MATMUL, DENSE, SPARSE = CASES[0], CASES[2], CASES[3]


def dynamic(case: Case) -> str:
    """The tensors of a network: -1 where the number of rows is."""
    marked = [(kind, tuple(-1 if size == 77 else size for size in shape)) for kind, shape in case.tensors(77)]
    return words("", marked)


def test_creators(device: Device) -> None:
    (answer,) = device.run("creators", driver=False)
    found = {each.split()[0]: each.split()[1:] for each in answer.text.split(";") if each.strip()}
    assert {name: rest[:2] for name, rest in found.items()} == {
        name: [PLUGIN_VERSION, NAMESPACE]
        for name in ("CpmMatMulNBits", "CpmSparseAttention", "CpmLinearAttention")
    }
    # kCHAR is 6, kINT32 5.
    assert found["CpmMatMulNBits"][2:] == ["plan:6", "bits:5", "group:5", "n:5", "k:5"]
    assert found["CpmSparseAttention"][2:] == ["plan:6", "topk:5"]
    assert found["CpmLinearAttention"][2:] == ["plan:6"]


@each_case
def test_network(device: Device, case: Case) -> None:
    tensors = dynamic(case)
    answers = device.run(
        device.create(case),
        "identity",
        "types" + tensors,
        "shapes" + tensors,
        "aliases",
        "configure" + tensors,
        driver=False,
    )
    assert not any(each.errors for each in answers)
    created, identity, types, shapes, aliases, configured = (each.text for each in answers)
    assert created == "ok"
    assert identity == f"{case.op} {PLUGIN_VERSION} {NAMESPACE} PLUGIN_V3ONE_BUILD 2 {len(case.types)}"
    assert types.split() == [str(each) for each in case.types]
    assert shapes.split() == list(case.shapes)
    assert aliases.split() == [str(each) for each in case.aliases]
    assert configured == "0"


@each_case
def test_formats(device: Device, case: Case) -> None:
    _, answer = device.run(device.create(case), "formats" + dynamic(case), driver=False)
    types = [kind for kind, _ in case.tensors(1)] + list(case.types)
    assert answer.text.split() == [f"{kind}/{LINEAR}," for kind in types]


@each_case
@pytest.mark.parametrize("rows", [1, 2, 33, 512])
def test_workspace(device: Device, case: Case, rows: int) -> None:
    _, answer = device.run(device.create(case), words("workspace", case.tensors(rows)), driver=False)
    assert answer == type(answer)(str(case.plan.workspace_bytes(rows)), [])


@each_case
def test_serialization(device: Device, case: Case) -> None:
    answers = device.run(
        device.create(case), "clone", "serialize", "clone", "serialize", "aliases", driver=False
    )
    created, cloned, first, _, second, aliases = (each.text for each in answers)
    assert created == cloned == "ok"
    assert first == second
    text = json.dumps(case.plan.to_json())
    assert first.split(" ")[:2] == ["plan", text]
    stored = dict(zip(first.split()[2:-1:2], map(int, first.split()[3:-1:2]), strict=True))
    assert stored == case.attributes
    assert first.endswith(" ok")
    assert aliases.split() == [str(each) for each in case.aliases]


@pytest.mark.parametrize(
    ("case", "changes", "message"),
    [
        (MATMUL, {"k": None}, "k: expected this attribute, got none"),
        (MATMUL, {"k": "s:/dev/null"}, "k: expected one 32-bit integer"),
        (MATMUL, {"plan": 1}, "plan: expected a string"),
        (MATMUL, {"plan": None}, "plan: expected this attribute, got none"),
        (DENSE, {"topk": None}, "topk: expected this attribute, got none"),
        # The plan of a sparse layer writes an output that a dense node lacks.
        (SPARSE, {"topk": 0}, "pooled: expected one of the 3 outputs, got output:3"),
    ],
)
def test_attributes_are_checked(device: Device, case: Case, changes: Fields, message: str) -> None:
    (answer,) = device.run(device.create(case, changed=changes), driver=False)
    assert answer.text == "null"
    assert len(answer.errors) == 1
    assert answer.errors[0].startswith(case.op + ": ")
    assert message in answer.errors[0]


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ('{"version":1', "{", "plan: "),
        ('{"version":1', '{"version":2', "version: expected 1, got 2"),
        ('"unit":8', '"unit":0', "unit: expected 1 or more, got 0"),
        ('"rows_up_to":1,', '"rows_up_to":null,', "expected growing limits and null at the end"),
        ('"rows_up_to":null', '"rows_up_to":1000000', "expected one for any number of rows at the end"),
        (
            '"workspace:scores"',
            '"workspace:gone"',
            "scores: expected a workspace of the plan, got workspace:gone",
        ),
        ('"input:5"', '"input:7"', "past_length: expected one of the 7 inputs, got input:7"),
        ('"input:5"', '"memory:5"', "past_length: expected a buffer, got memory:5"),
        ('"input:5"', "5", "past_length: expected a buffer, got 5"),
        ('"capacity":256', '"capacity":2.5', "capacity: expected an integer or rows, got 2.5"),
        ('"capacity":256', '"capacity":3000000000', "expected a 32-bit integer, got 3000000000"),
        ('"capacity":256', '"space":256', "expected an argument capacity, got none"),
        ('"capacity":256', '"capacity":256,"more":1', "arguments, got"),
        ('"kernel":"attention_append', '"kernel":"attention_prepend', "expected kernel attention_prepend"),
    ],
)
def test_plans_are_checked(device: Device, old: str, new: str, message: str) -> None:
    text = SPARSE.plan.to_json()
    assert old in text
    (answer,) = device.run(device.create(SPARSE, text.replace(old, new, 1)), driver=False)
    assert answer.text == "null"
    assert message in answer.errors[0], answer.errors


def test_aligned_integers_are_checked(device: Device) -> None:
    (answer,) = device.run(
        device.create(MATMUL, MATMUL.plan.to_json().replace('"k":192', '"k":200')), driver=False
    )
    assert "k: expected a multiple of 16, got 200" in answer.errors[0]


@pytest.mark.parametrize(
    ("case", "position", "shape", "message"),
    [
        (MATMUL, 0, (1, -1, 200), "x: expected size 192 of dimension 2, got 200"),
        (MATMUL, 1, (73, 96), "codes: expected size 72 of dimension 0, got 73"),
        (MATMUL, 1, (72, 90), "codes: expected size 96 or more of dimension 1, got 90"),
        (MATMUL, 2, (2, 72), "scales: expected size 3 or more of dimension 0, got 2"),
        (MATMUL, 3, (4, 72), "zeros: expected size 3 of dimension 0, got 4"),
        (DENSE, 0, (2, -1, 64), "query: expected size 1 of dimension 0, got 2"),
        (DENSE, 1, (1, -1, 48), "key: expected size 32 of dimension 2, got 48"),
        (DENSE, 4, (1, 2, 128, 16), "value_cache: expected size 256 of dimension 2, got 128"),
        (DENSE, 5, (1, 1), "past_length: expected 1 dimensions, got 2"),
        (SPARSE, 6, (1, 2, 65, 16), "key_cache: expected a multiple of 65 in dimension 2, got 256"),
        (CASES[4], 3, (1, 3, 32, 32), "value: expected size 96 of dimension 2, got 48"),
        (CASES[4], 4, (4,), "decay: expected size 3 of dimension 0, got 4"),
    ],
)
def test_shapes_are_checked(
    device: Device, case: Case, position: int, shape: tuple[int, ...], message: str
) -> None:
    tensors = dynamic(case).split()
    tensors[position] = f"{tensors[position].split(':')[0]}:{'x'.join(map(str, shape))}"
    for command in ("configure", "shapes"):
        _, answer = device.run(device.create(case), " ".join([command, *tensors]), driver=False)
        assert answer.text in ("1", "failed")
        assert answer.errors == [f"{case.op} layer.{case.name}: {message}"]


@pytest.mark.parametrize(("case", "expected"), [(MATMUL, 4), (DENSE, 6), (SPARSE, 7)], ids=str)
def test_inputs_are_counted(device: Device, case: Case, expected: int) -> None:
    tensors = dynamic(case).split()
    _, fewer, more = device.run(
        device.create(case),
        " ".join(["configure", *tensors[:-1]]),
        " ".join(["configure", *tensors, tensors[-1]]),
        driver=False,
    )
    assert fewer.text == more.text == "1"
    assert (
        f"expected the {expected} inputs" in fewer.errors[0]
        or f"expected {expected} inputs" in fewer.errors[0]
    )
    assert f"expected {expected} inputs, got {expected + 1}" in more.errors[0]


def test_types_are_checked(device: Device) -> None:
    _, answer = device.run(
        device.create(MATMUL), "types" + dynamic(MATMUL).replace("1:", "0:", 1), driver=False
    )
    assert answer.text == "failed"
    assert "x: expected data type 1, got 0" in answer.errors[0]
