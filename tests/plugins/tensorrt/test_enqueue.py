"""What reaches the CUDA driver."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.plugins.tensorrt.cases import CASES, Case
from tests.plugins.tensorrt.harness import (
    OUTPUTS,
    WORKSPACE,
    Device,
    enqueue,
    expected_launches,
    fnv,
    words,
)

each_case = pytest.mark.parametrize("case", CASES, ids=str)
MATMUL, DENSE, SPARSE = CASES[0], CASES[2], CASES[3]
# Besides the limits of variants: tiles with and without a rest, and chunks.
ROWS = (2, 3, 7, 8, 15, 16, 17, 31, 32, 33, 63, 64, 65, 100, 511, 512)


@each_case
def test_launches_are_those_of_the_plan(device: Device, kernels: Path, case: Case) -> None:
    rows = sorted({*ROWS, *case.limits()})
    commands = [each for n in rows for each in (words("change", case.tensors(n)), enqueue(case, n))]
    answers = device.run(device.create(case), "serialize", "attach", *commands)
    assert not any(each.errors for each in answers)
    assert {each.text for each in answers[3:]} == {"0"}
    assert device.calls() == [launch for n in rows for launch in expected_launches(case, n, kernels)]


@each_case
def test_kernels_are_loaded_once_and_before_the_first_launch(
    device: Device, kernels: Path, case: Case
) -> None:
    change, launch = words("change", case.tensors(5)), enqueue(case, 5)
    device.run(device.create(case), "attach")
    loaded = device.calls("load")
    files = sorted(fnv(kernels / f"{each.name}.cubin") for each in case.plan.kernels())
    assert sorted(each["module"] for each in loaded) == files
    device.run(device.create(case), "attach", change, launch, "clone", "attach", change, launch, launch)
    assert device.calls("load") == loaded
    assert len(device.calls()) == 3 * len(case.plan.variant(5).launches)


def test_contexts_have_modules_of_their_own(device: Device) -> None:
    change, launch = words("change", DENSE.tensors(1)), enqueue(DENSE, 1)
    commands = [change, launch, "context 2", launch, launch, "context 1", launch]
    answers = device.run(device.create(DENSE), *commands)
    assert not any(each.errors for each in answers)
    assert len(device.calls("load")) == 2 * len(DENSE.plan.kernels())
    assert len(device.calls()) == 4 * len(DENSE.plan.variant(1).launches)


def test_kernels_with_much_shared_memory(device: Device) -> None:
    """The stub, as a driver, refuses more than 48 KiB that were not asked for."""
    index = device.library.parent / "kernels/index.json"
    content = json.loads(index.read_text())
    for kernel in content["kernels"]:
        kernel["shared_bytes"] = 60 << 10
    index.write_text(json.dumps(content))
    *_, last = device.run(device.create(MATMUL), words("change", MATMUL.tensors(1)), enqueue(MATMUL, 1))
    assert last.text == "0"
    assert device.calls()[0]["shared"] == 60 << 10


@pytest.mark.parametrize("output", [1, 2, 3])
def test_outputs_in_place_are_checked(device: Device, output: int) -> None:
    moved = enqueue(SPARSE, 1, **{f"output{output}": OUTPUTS})
    *_, answer = device.run(device.create(SPARSE), words("change", SPARSE.tensors(1)), moved)
    assert answer.text == "1"
    name, cache = (("key", "key_cache"), ("value", "value_cache"), ("pooled", "pooled_cache"))[output - 1]
    assert f"present_{name}: expected the address of {cache}" in answer.errors[0]
    assert "ALIASED_PLUGIN_IO_10_03 and bind both to one buffer" in answer.errors[0]
    assert not device.calls()


@pytest.mark.parametrize(
    ("case", "command", "message"),
    [
        (MATMUL, enqueue(MATMUL, 1, input0=0), "x: expected an address, got none"),
        (MATMUL, enqueue(MATMUL, 1, input1=8), "codes: expected an address that is a multiple of 16, got 8"),
        (SPARSE, enqueue(SPARSE, 1, workspace=0), "statistics: expected an address, got none"),
        (SPARSE, enqueue(SPARSE, 1, workspace=WORKSPACE + 8), "expected an address that is a multiple of 16"),
    ],
)
def test_buffers_are_checked_before_the_first_launch(
    device: Device, case: Case, command: str, message: str
) -> None:
    *_, answer = device.run(device.create(case), words("change", case.tensors(1)), command)
    assert answer.text == "1"
    assert message in answer.errors[0]
    assert answer.errors[0].startswith(f"{case.op} layer.{case.name}: ")
    assert not device.calls()


def test_grids_beyond_cuda_are_refused(device: Device) -> None:
    rows = 3_000_000_000
    *_, answer = device.run(
        device.create(MATMUL), words("change", MATMUL.tensors(rows)), enqueue(MATMUL, rows)
    )
    assert answer.errors == ["CpmMatMulNBits layer.int4: rows: expected 1 to 2147483647, got 3000000000"]
    plan = MATMUL.plan.to_json().replace('"n":72', '"n":2147483647')
    rows = 2_000_000_000
    *_, answer = device.run(
        device.create(MATMUL, plan), words("change", MATMUL.tensors(rows)), enqueue(MATMUL, rows)
    )
    assert "expected a grid of 1 to 2147483647 blocks on axis 0" in answer.errors[0]
    assert "got 33554432 times 31250000 for 2000000000 rows" in answer.errors[0]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"driver": False}, "expected the CUDA driver, got: libcuda.so.1: cannot open shared object file"),
        (
            {"sm": 110},
            "expected a device of sm_87, for which the bundle's kernels were compiled, got sm_110; "
            "export for this device with --chip",
        ),
        ({"context": 0}, "expected a current CUDA context on this thread, got none"),
        ({"fail": "cuModuleLoadData"}, ".cubin: the CUDA driver says CUDA_ERROR_NO_BINARY_FOR_GPU"),
    ],
)
def test_devices_are_checked(device: Device, settings: dict[str, int | str | bool], message: str) -> None:
    change = words("change", DENSE.tensors(1))
    created, changed, attached = device.run(device.create(DENSE), change, "attach", **settings)  # type: ignore[arg-type]
    assert created.text == "ok"
    assert (changed.text, attached.text) == ("1", "null")
    for answer in (changed, attached):
        assert answer.errors[0].startswith("CpmSparseAttention layer.dense: ")
        assert message in answer.errors[0]


def test_failed_launches_are_reported(device: Device) -> None:
    *_, answer = device.run(
        device.create(DENSE), words("change", DENSE.tensors(1)), enqueue(DENSE, 1), fail="cuLaunchKernel"
    )
    assert answer.text == "1"
    assert (
        "launching attention_append_d16: the CUDA driver says CUDA_ERROR_LAUNCH_OUT_OF_RES"
        in answer.errors[0]
    )


def test_bundles_are_checked(device: Device) -> None:
    folder = device.library.parent / "kernels"
    cubin = next(folder.glob("attention_append*.cubin"))
    cubin.write_bytes(cubin.read_bytes()[:-1])
    _, answer = device.run(device.create(DENSE), words("change", DENSE.tensors(1)))
    assert f"{cubin.name}: expected" in answer.errors[0] and "copy the bundle again" in answer.errors[0]
    index = folder / "index.json"
    text = index.read_text()
    for old, new, message in (
        ('"format_version": 1', '"format_version": 2', "format_version: expected 1, got 2"),
        ('"sm": 87', '"sn": 87', "key 'sm' not found"),
        ('"scratch_bytes": 0', '"scratch_bytes": 4', "expected no scratch memory, got 4 bytes"),
        ('"type": "*fp16"', '"type": "i64"', "expected a pointer, i32 or fp32, got i64"),
    ):
        assert old in text
        index.write_text(text.replace(old, new))
        (answer,) = device.run(device.create(DENSE))
        assert answer.text == "null"
        assert message in answer.errors[0]
        assert "kernels/index.json: " in answer.errors[0]
    index.unlink()
    (answer,) = device.run(device.create(DENSE))
    assert "expected the index of the bundle's kernels, which cannot be read" in answer.errors[0]
