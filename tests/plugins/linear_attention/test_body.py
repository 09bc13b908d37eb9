"""The ONNX function body against the reference, on both engines that run it."""

from __future__ import annotations

import pytest

from cpm_edge.plugins.linear_attention.body import functions
from cpm_edge.plugins.linear_attention.spec import OP, LinearAttentionSpec
from tests.plugins.linear_attention.cases import STRONGEST, WEAKEST, make_case
from tests.plugins.linear_attention.engines import Make, onnxruntime_body, openvino_body

ENGINES = pytest.mark.parametrize("make", [onnxruntime_body, openvino_body], ids=["onnxruntime", "openvino"])


@ENGINES
@pytest.mark.parametrize(("heads", "size", "value_size"), [(1, 8, 8), (3, 16, 24), (32, 64, 64)])
def test_odd_lengths(make: Make, heads: int, size: int, value_size: int) -> None:
    """One compiled model for every length and batch size."""
    spec = make_case(1, heads, size, value_size).spec
    run = make(spec, size, value_size)
    for rows in (1, 2, 63, 64, 65, 130):
        case = make_case(rows, heads, size, value_size, batch=2 if rows < 65 else 1)
        case.check(*run(*case.inputs))


@ENGINES
def test_chunks_do_not_change_anything(make: Make) -> None:
    case = make_case(196, 3, 16)
    run = make(case.spec, 16, 16)
    for chunks in ([196], [1, 1, 63, 64, 65, 1, 1], [100, 96]):
        case.check(*case.feed(run, chunks))


@ENGINES
def test_strong_and_weak_decay_over_a_thousand_rows(make: Make) -> None:
    """Also one so strong that products of its powers, taken apart, would overflow."""
    spec = LinearAttentionSpec((STRONGEST, WEAKEST, 0.0, -30.0), 0.25)
    case = make_case(1000, 4, 16, spec=spec)
    case.check(*make(spec, 16, 16)(*case.inputs))


@ENGINES
@pytest.mark.parametrize("opset", [21, 22, 23])
def test_the_opsets_of_our_targets(make: Make, opset: int) -> None:
    case = make_case(70, 2, 8)
    case.check(*make(case.spec, 8, 8, opset=opset)(*case.inputs))


def test_the_bodies_are_fresh_copies_for_the_opset_asked_for() -> None:
    first, second = functions(opset=23), functions(opset=23)
    assert first[-1].name == OP
    assert {function.opset_imports[""] for function in first} == {23}
    assert not {id(function) for function in first} & {id(function) for function in second}
