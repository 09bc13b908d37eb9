"""The decode program of a graph: which graphs are refused, and that no op writes where another value lies.

What it computes is compared with prefill in test_native, each op with its kernel in tests/plugins.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir
import openvino as ov
import pytest

from cpm_edge.exporter.targets.aipc_native import OPS
from cpm_edge.plugins.matmul_nbits.native import panel_bytes
from cpm_edge.plugins.matmul_nbits.spec import NBitsShape
from cpm_edge.plugins.session import NativeSession
from cpm_edge.plugins.sparse_attention.cache import AttentionCache
from cpm_edge.plugins.sparse_attention.spec import SparseAttentionSpec
from cpm_edge.plugins.sparse_mlp.spec import slice_bytes, slice_count, strip_bytes
from cpm_edge.runtimes.errors import BundleError
from cpm_edge.runtimes.openvino import program
from cpm_edge.runtimes.openvino.program import DecodeStep
from tests.plugins.matmul_nbits.test_native import Weight
from tests.support.native_graphs import VOCAB, NativeGraph

Array = npt.NDArray[Any]
WIDTH, INNER = 32, 24
COSINE, SINE, PAST = "cosine8", "sine8", "past"
AGAIN = "Export the bundle again with this version of cpm-edge."


def scheme(rows: int) -> dict[str, Any]:
    return {"rows": rows, "bits": 8, "group": 0, "symmetric": 1}


def panels(rows: int, cols: int, count: int = 1) -> Array:
    return np.zeros(count * panel_bytes(NBitsShape(rows, cols, 8, 0)), np.uint8)


def ones(*shape: int) -> Array:
    return np.ones(shape, np.float32)


@dataclass(frozen=True)
class Node:
    """One of our nodes.

    Attributes:
        inputs: numbers are values of so many floats, arrays constants, names tables or the position.
        attributes: all of them.
        width: of its output.
    """

    inputs: list[int | str | Array]
    attributes: dict[str, Any]
    width: int = WIDTH


UP, DOWN = NBitsShape(INNER, WIDTH, 8, 0), NBitsShape(WIDTH, INNER, 8, 0)
STRIPS = np.zeros(INNER * strip_bytes(UP), np.uint8)
SLICES = np.zeros(slice_count(DOWN) * slice_bytes(DOWN), np.uint8)
EPSILON, SCALE = {"epsilon": 1e-5}, {"scale": 0.5}
ATTENTION = SparseAttentionSpec.dense(4, 1, 0.5)
LATENT = {"num_heads": 2, "rank": 16, "nope_size": 8, "rope_size": 8, "value_size": 16, "groups": 1}
UP_BYTES = 2 * (8 + 16) * (4 + 16)
ROW: tuple[int, Array] = (WIDTH, ones(WIDTH))  # to be normalized

NODES = {
    "NormLinear": Node([*ROW, panels(INNER, WIDTH)], scheme(INNER) | EPSILON | SCALE, INNER),
    "LinearAdd": Node([INNER, WIDTH, panels(WIDTH, INNER)], scheme(WIDTH) | SCALE),
    "NormGated": Node([*ROW, *(panels(INNER, WIDTH),) * 2], scheme(INNER) | EPSILON, INNER),
    "NormExperts": Node(
        [*ROW, ones(3, WIDTH), *(panels(INNER, WIDTH, 3),) * 2, panels(WIDTH, INNER, 3)],
        scheme(INNER) | EPSILON | SCALE | {"top_k": 2},
    ),
    "NormSparseMlp": Node(
        [*ROW, WIDTH, panels(INNER, WIDTH), STRIPS, SLICES],
        scheme(INNER) | EPSILON | SCALE | {"threshold": 0.1},
    ),
    "CachedAttention": Node([6 * 8, COSINE, SINE, PAST], ATTENTION.attributes() | {"layer": 0, "gated": 0}),
    "RecurrentAttention": Node(
        [4 * 16, ones(8), ones(8), ones(16), COSINE, SINE, -ones(2)], {"layer": 1} | EPSILON | SCALE, 16
    ),
    "LatentAttention": Node(
        [WIDTH, 16 + 8, ones(16), COSINE, SINE, np.zeros(UP_BYTES, np.uint8), PAST],
        {"layer": 2} | LATENT | EPSILON | SCALE,
    ),
}


def linear(graph: NativeGraph, x: ir.Value, rows: int, cols: int, name: str) -> ir.Value:
    norm = graph.constant(f"{name}.norm", ones(cols))
    weight = graph.constant(f"{name}.panels", Weight(rows, cols, 8, 0, True).panels, np.uint8)
    return graph.native("NormLinear", [x, norm, weight], name, **scheme(rows), **EPSILON, **SCALE)


def build(kind: str, change: dict[int, Any] | None = None) -> ov.Model:
    """The embedding, the node "it", and a head.

    ``change`` has other inputs by their index, None for one that is no constant.
    """
    graph, node = NativeGraph(WIDTH), NODES[kind]
    inputs = [_input(graph, index, given, change or {}) for index, given in enumerate(node.inputs)]
    it = graph.native(kind, inputs, "it", **node.attributes)
    return graph.model(linear(graph, it, VOCAB, node.width, "head"))


def _input(graph: NativeGraph, index: int, given: Any, change: dict[int, Any]) -> ir.Value:
    wanted = change.get(index, given)
    if wanted is None:
        return graph.parameter(f"parameter{index}", list(given.shape))
    if isinstance(wanted, np.ndarray):
        return graph.constant(f"constant{index}", wanted, wanted.dtype)
    if isinstance(wanted, int):
        return graph.x if wanted == WIDTH else linear(graph, graph.x, wanted, WIDTH, f"input{index}")
    return graph.past if wanted == PAST else graph.tables[wanted]


def places(kind: type) -> list[tuple[str, int]]:
    """(node, input) of all inputs of a kind."""
    every = [(name, index, given) for name, node in NODES.items() for index, given in enumerate(node.inputs)]
    return [(name, index) for name, index, given in every if isinstance(given, kind)]


def run(step: DecodeStep, values: Array) -> Array:
    """The logits of a token at position 0."""
    session, result = NativeSession(2, layers=3), np.full(step.vocab_size, np.nan, np.float32)
    cache, state = AttentionCache.empty(ATTENTION, 1, 64, 8), np.zeros((2, 8, 8), np.float32)
    latent = AttentionCache(np.zeros((1, 1, 64, 24), np.float16), None, None)
    session.set_cache(0, cache)
    session.set_state(1, state)
    session.set_cache(2, latent)
    step.program.run(session, 0, values, result)
    session.close()
    return result


def test_every_op_of_a_bundle_is_one_of_the_program() -> None:
    assert set(OPS) == set(NODES) == set(program._OPS) - {"Gather"}


@pytest.mark.parametrize("kind", NODES)
def test_every_op_leaves_the_token_and_the_tables_alone(kind: str) -> None:
    step, rotated = DecodeStep(build(kind)), (kind, 1) in places(str) or (kind, 4) in places(str)
    assert step.vocab_size == VOCAB and step.place[1] == WIDTH
    assert [floats for _, floats in step.rotary_places] == ([4, 4] if rotated else [])
    values = step.values.array()
    values[:] = np.nan
    kept = [step.place, *step.rotary_places]
    for number, (offset, floats) in enumerate(kept):
        values[offset : offset + floats] = 0.5 + number
    assert np.isfinite(run(step, values)).all()
    for number, (offset, floats) in enumerate(kept):
        assert (values[offset : offset + floats] == 0.5 + number).all()


def test_tables_do_not_lie_where_a_value_was() -> None:
    """One of their size, which nobody needs any more when the first op that rotates comes."""
    graph = NativeGraph(WIDTH)
    qkv = linear(graph, linear(graph, graph.x, 16, WIDTH, "narrow"), 6 * 8, 16, "qkv")
    inputs, attributes = [qkv, graph.tables[COSINE], graph.tables[SINE], graph.past], ATTENTION.attributes()
    it = graph.native("CachedAttention", inputs, "it", **attributes, layer=0, gated=0)
    step = DecodeStep(graph.model(linear(graph, it, VOCAB, WIDTH, "head")))
    values = step.values.array()
    values[:] = 7
    run(step, values)
    for offset, floats in step.rotary_places:
        assert (values[offset : offset + floats] == 7).all()


def test_a_long_chain_needs_no_more_places_than_a_short_one() -> None:
    sizes = []
    for length in (4, 20):
        graph = NativeGraph(WIDTH)
        x = graph.x
        for index in range(length):
            x = linear(graph, x, WIDTH, WIDTH, f"linear{index}")
        sizes.append(DecodeStep(graph.model(linear(graph, x, VOCAB, WIDTH, "head"))).values.size)
    assert sizes == [3 * WIDTH] * 2


def test_the_tables_have_a_graph_of_their_own() -> None:
    assert DecodeStep(build("NormLinear")).rotary is None
    rotary = DecodeStep(build("CachedAttention")).rotary
    assert rotary is not None
    assert [list(output.shape) for output in rotary.outputs] == [[1, 1, 4]] * 2
    assert {parameter.get_friendly_name() for parameter in rotary.get_parameters()} <= {
        "input_ids",
        "past_length",
    }


FAULTS = {"size": r"\d+ of ", "type": r"\d+ of (float16|int8)", "missing": "no constant"}


@pytest.mark.parametrize(("kind", "index"), places(np.ndarray))
@pytest.mark.parametrize("fault", FAULTS)
def test_a_constant_that_does_not_fit_is_named(kind: str, index: int, fault: str) -> None:
    right: Any = NODES[kind].inputs[index]
    wrong = {
        "size": np.concatenate([right, right[..., :1]], -1),
        "type": right.astype(np.float16 if right.dtype == np.float32 else np.int8),
        "missing": None,
    }
    message = f"^it, input {index}: expected {right.size} of {right.dtype}, got {FAULTS[fault]}"
    if (kind, index, fault) == ("RecurrentAttention", 6, "size"):
        message = "^it, input 1: expected 5 of float32, got 8"  # there are as many heads as decays
    with pytest.raises(BundleError, match=message) as caught:
        DecodeStep(build(kind, {index: wrong[fault]}))
    assert caught.value.hint == AGAIN


@pytest.mark.parametrize(("kind", "index"), places(int))
def test_values_of_another_width_are_refused(kind: str, index: int) -> None:
    width: Any = NODES[kind].inputs[index]
    with pytest.raises(BundleError, match=r"^it, input \d: expected \d+ .*, got \d+"):
        DecodeStep(build(kind, {index: width + 16}))


@pytest.mark.parametrize(("kind", "index"), places(str))
def test_tables_of_another_width_are_refused(kind: str, index: int) -> None:
    if NODES[kind].inputs[index] == PAST:
        return
    wide = str(NODES[kind].inputs[index]).replace("8", "16")
    with pytest.raises(BundleError, match=f"^it, input {index}: expected 4 floats, got 8"):
        DecodeStep(build(kind, {index: wide}))


@pytest.mark.parametrize(("place", "column"), [(0, -1), (5, INNER)])
def test_columns_that_do_not_exist_are_refused(place: int, column: int) -> None:
    columns = np.arange(INNER, dtype=np.int32)
    graph = NativeGraph(WIDTH)
    inner, given = linear(graph, graph.x, INNER, WIDTH, "inner"), columns.copy()
    given[place] = column
    sorting = graph.op("Gather", [inner, graph.constant("columns", given, np.int32)], "sorting", axis=-1)
    message = rf"^sorting, input 1: expected columns in \[0, 24\), got {given.min()} to {given.max()}"
    with pytest.raises(BundleError, match=message):
        DecodeStep(graph.model(linear(graph, sorting, VOCAB, INNER, "head")))


def test_another_node_between_ours_is_named() -> None:
    graph = NativeGraph(WIDTH)
    between = graph.op("Relu", [linear(graph, graph.x, INNER, WIDTH, "first")], "between")
    with pytest.raises(BundleError, match=r"got Relu between$") as caught:
        DecodeStep(graph.model(linear(graph, between, VOCAB, INNER, "head")))
    assert caught.value.hint == AGAIN


def test_another_node_behind_ours_is_named() -> None:
    graph = NativeGraph(WIDTH)
    head = linear(graph, graph.x, VOCAB, WIDTH, "head")
    with pytest.raises(BundleError, match=r"^logits: expected a native op, got Relu \w+$"):
        DecodeStep(graph.model(graph.op("Relu", [head], "behind")))
