"""Plans: what is checked when they are made, and the sizes a device computes from them."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cpm_edge.plugins.kernel_config import KernelConfig, Parameter, Quotient
from cpm_edge.plugins.launch_plan import (
    ROWS,
    Argument,
    Launch,
    LaunchPlan,
    Variant,
    Workspace,
    distinct,
    inputs,
    outputs,
    workspaces,
)

KERNEL = KernelConfig(
    name="scale_rows",
    module="nowhere",
    function="scale_rows",
    parameters=(
        Parameter("x", "*fp16", True),
        Parameter("sums", "*fp32", True),
        Parameter("y", "*fp16", True),
        Parameter("rows", "i32"),
        Parameter("columns", "i32", True),
        Parameter("factor", "fp32"),
    ),
    constants={"TILE": 8},
    grid=((Quotient("rows", 8),), (Quotient("columns", 32), Quotient("rows")), ()),
)
ARGUMENTS: dict[str, Argument] = {
    **inputs("x"),
    **outputs("y"),
    **workspaces("sums"),
    "rows": ROWS,
    "columns": 64,
    "factor": 0.5,
}
SUMS = Workspace("sums", 4, (8,))


def plan(*limits: int | None, scratch: tuple[Workspace, ...] = (SUMS,)) -> LaunchPlan:
    return LaunchPlan(tuple(Variant(limit, (Launch(KERNEL, ARGUMENTS),)) for limit in limits), scratch)


def test_json_is_what_a_device_reads() -> None:
    read = json.loads(plan(1, None).to_json())
    assert read["workspace"] == [{"name": "sums", "unit": 4, "divisors": [8]}]
    assert [each["rows_up_to"] for each in read["variants"]] == [1, None]
    assert read["variants"][0]["launches"] == [
        {
            "kernel": "scale_rows",
            "arguments": {
                "x": "input:0",
                "y": "output:0",
                "sums": "workspace:sums",
                "rows": "rows",
                "columns": 64,
                "factor": 0.5,
            },
        }
    ]


@pytest.mark.parametrize(("rows", "limit"), [(1, 1), (2, 7), (7, 7), (8, None), (4096, None)])
def test_first_variant_that_holds_the_rows(rows: int, limit: int | None) -> None:
    assert plan(1, 7, None).variant(rows).rows_up_to == limit


def test_grid_is_made_of_rows_and_constants() -> None:
    launch = Launch(KERNEL, ARGUMENTS)
    assert launch.grid(9) == (2, 18, 1)


@given(rows=st.integers(1, 10_000), units=st.lists(st.integers(1, 5000), min_size=1, max_size=4))
def test_workspaces_are_aligned_and_apart(rows: int, units: list[int]) -> None:
    scratch = tuple(Workspace(f"w{index}", unit, (3,)) for index, unit in enumerate(units))
    parameters = tuple(Parameter(each.name, "*u8") for each in scratch)
    kernel = KernelConfig("k", "m", "f", parameters, {}, ((), (), ()))
    launch = Launch(kernel, workspaces(*(each.name for each in scratch)))
    made = LaunchPlan((Variant(None, (launch,)),), scratch)
    offsets = made.offsets(rows)
    ends = [*list(offsets.values())[1:]]
    for each, end in zip(scratch, ends, strict=True):
        assert offsets[each.name] % 256 == 0
        assert offsets[each.name] + each.unit * -(-rows // 3) <= end
    assert made.workspace_bytes(rows) == ends[-1]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": 3}, "x: expected a buffer, got 3"),
        ({"factor": 1}, "factor: expected a float, got 1"),
        ({"rows": True}, "rows: expected an integer or rows, got True"),
        ({"columns": 40}, "columns: expected a multiple of 16, got 40"),
        ({"columns": ROWS}, "columns: expected a multiple of 16, got 'rows'"),
        ({"other": 1}, "expected arguments x, sums, y, rows, columns, factor, got"),
    ],
)
def test_arguments_fit_the_kernel(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Launch(KERNEL, {**ARGUMENTS, **change})


@pytest.mark.parametrize("limits", [(), (1,), (None, None), (None, 1), (4, 4, None), (4, 2, None)])
def test_variants_cover_every_number_of_rows(limits: tuple[int | None, ...]) -> None:
    with pytest.raises(ValueError, match="variants: expected"):
        plan(*limits)


@pytest.mark.parametrize("scratch", [(), (SUMS, SUMS), (SUMS, Workspace("more", 1))])
def test_workspaces_are_the_used_ones(scratch: tuple[Workspace, ...]) -> None:
    with pytest.raises(ValueError, match=r"workspaces: expected \['sums'\]"):
        plan(None, scratch=scratch)


@pytest.mark.parametrize(("unit", "divisors"), [(0, (1,)), (4, (0,))])
def test_sizes_are_positive(unit: int, divisors: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="expected sizes of 1 or more"):
        Workspace("sums", unit, divisors)


def test_one_configuration_a_name() -> None:
    other = KernelConfig(**{**KERNEL.__dict__, "warps": 8})
    both = LaunchPlan((Variant(None, (Launch(other, ARGUMENTS),)),), (SUMS,))
    assert distinct([plan(None), plan(1, None)]) == [KERNEL]
    with pytest.raises(ValueError, match="scale_rows: expected one configuration of this name, got two"):
        distinct([plan(None), both])
