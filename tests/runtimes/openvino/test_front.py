"""What a decode step reads, against the graph that prefill runs."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import openvino as ov
import openvino.opset15 as ops
import pytest

from cpm_edge.runtimes.errors import BundleError
from cpm_edge.runtimes.openvino.front import POSITIONS, Embedding, RotaryTables, reads_token
from cpm_edge.runtimes.openvino.native import MODEL, OpenVinoNativeEngine
from cpm_edge.runtimes.session import FloatArray
from tests.support.bundles import NATIVE, Bundles
from tests.support.checkpoints import VOCAB
from tests.support.native_graphs import core

EXACT = {"INFERENCE_NUM_THREADS": 1, "PERFORMANCE_HINT": "LATENCY"}


def node_of(bundles: Bundles, variant: str, kind: str, **options: Any) -> tuple[ov.Model, ov.Node]:
    """The prefill graph and its first node of a type."""
    model = core().read_model(bundles.open(variant, "aipc", **NATIVE, **options).file(MODEL))
    return model, next(node for node in model.get_ordered_ops() if node.get_type_name() == kind)


def computed(model: ov.Model, outputs: list[ov.Output], tokens: int) -> list[FloatArray]:
    """What prefill computes at these places (tokens, n), for the tokens 0, 1 and so on from position 0."""
    inputs = [p for p in model.get_parameters() if p.get_friendly_name() in ("input_ids", "past_length")]
    part = ov.Model([ops.result(output) for output in outputs], inputs, "part")
    given = {"input_ids": np.arange(tokens)[None] % VOCAB, "past_length": np.zeros(1, np.int64)}
    found = core().compile_model(part, "CPU", EXACT)(given)
    return [np.array(found[index][0]) for index in range(len(outputs))]


@pytest.mark.parametrize("stored", ["int8", "fp32", "fp16", "bf16"])
def test_a_row_is_that_of_the_prefill_graph(bundles: Bundles, stored: str) -> None:
    options = {} if stored == "int8" else {"embedding_format": stored}  # the former is the default
    model, first = node_of(bundles, "longrope", "NormLinear", **options)
    embedding = Embedding(first.input_value(0))
    assert embedding.factor == 1.5
    (expected,) = computed(model, [first.input_value(0)], VOCAB)
    got = np.stack([embedding.row(token) for token in range(VOCAB)])
    assert got.dtype == np.float32
    np.testing.assert_array_equal(got, expected)


def constant(*shape: int, dtype: Any = np.float32) -> ov.Node:
    return ops.constant(np.arange(1, 1 + np.prod(shape)).reshape(shape).astype(dtype))


def rows_of(table: ov.Node) -> ov.Node:
    tokens = ops.parameter([1, 1], np.int64, name="input_ids")
    return ops.gather(table, tokens, ops.constant(np.int64(0)))


def test_factors_on_either_side_multiply() -> None:
    codes = ops.convert(constant(5, 3, dtype=np.int8), "f32")
    rows = rows_of(ops.multiply(constant(5, 1), codes))
    half, three = np.float32(0.5), np.full((1, 1, 1), 3, np.float32)
    rows = ops.multiply(ops.multiply(ops.constant(half), rows), ops.constant(three))
    embedding = Embedding(rows.output(0))
    assert embedding.factor == 1.5
    np.testing.assert_array_equal(embedding.row(2), np.array([7, 8, 9]) * 3 * 1.5)


UNKNOWN: dict[str, Callable[[], ov.Node]] = {
    "Add": lambda: ops.add(rows_of(constant(5, 4)), constant(4)),
    "Multiply": lambda: ops.multiply(rows_of(constant(5, 4)), constant(4)),
    "Subtract": lambda: rows_of(ops.subtract(constant(5, 4), constant(5, 1))),
    "Reshape": lambda: rows_of(ops.reshape(constant(20), ops.constant([5, 4]), special_zero=False)),
    "Constant": lambda: rows_of(ops.convert(ops.constant(np.ones((5, 4)), dtype=ov.Type.i4), "f32")),
    "Parameter": lambda: ops.parameter([1, 1, 4], np.float32),
}


@pytest.mark.parametrize("kind", UNKNOWN)
def test_other_nodes_are_named(kind: str) -> None:
    with pytest.raises(
        BundleError, match=f"a table, scales and a factor, got {kind} {kind}_[0-9]+"
    ) as caught:
        Embedding(UNKNOWN[kind]().output(0))
    assert caught.value.hint == "Export the bundle again with this version of cpm-edge."


def test_what_depends_on_the_tokens_and_what_on_their_number() -> None:
    tokens = ops.parameter([1, -1], np.int64, name="input_ids")
    past = ops.parameter([1], np.int64, name="past_length")
    assert reads_token(tokens.output(0)) and reads_token(ops.convert(tokens, "f32").output(0))
    positions = ops.add(ops.gather(ops.shape_of(tokens), ops.constant([1]), ops.constant(0)), past)
    assert not reads_token(positions.output(0))


def native_engine(bundles: Bundles, variant: str) -> OpenVinoNativeEngine:
    engine = bundles.engine(variant, "aipc", **NATIVE)
    assert isinstance(engine, OpenVinoNativeEngine)
    return engine


def rotary_tables(engine: OpenVinoNativeEngine) -> RotaryTables:
    assert engine.rotary is not None
    return RotaryTables(engine.rotary, engine.decode.rotary_places)


def written(tables: RotaryTables, engine: OpenVinoNativeEngine, position: int) -> list[FloatArray]:
    """The tables' rows, after checking that nothing else was written."""
    values = np.full(engine.decode.values.size, np.nan, np.float32)
    tables.write(position, values)
    places = [slice(offset, offset + floats) for offset, floats in engine.decode.rotary_places]
    rows = [values[place].copy() for place in places]
    for place in places:
        values[place] = np.nan
    assert np.isnan(values).all()
    return rows


VARIANTS = pytest.mark.parametrize("variant", ["longrope", "dynamic-ntk"])


@VARIANTS
def test_rotary_rows_are_those_of_the_prefill_graph(bundles: Bundles, variant: str) -> None:
    """At the edges of what one run computes, and after rewinds."""
    engine = native_engine(bundles, variant)
    model, node = node_of(bundles, variant, "CachedAttention")
    expected = computed(model, [node.input_value(index) for index in (1, 2)], 255)
    tables = rotary_tables(engine)
    for position in (0, 1, 62, 63, 64, 65, 127, 128, 129, 254, 64, 63, 62, 127, 0, 200):
        for got, table in zip(written(tables, engine, position), expected, strict=True):
            np.testing.assert_array_equal(got, table[position])


@VARIANTS
def test_rotary_rows_are_the_formula(bundles: Bundles, variant: str) -> None:
    engine = native_engine(bundles, variant)
    with bundles.plan(variant, "aipc", **NATIVE) as (plan, _):
        rope = plan.config.rope.table(plan.max_context)
    tables = rotary_tables(engine)
    for position in (5, engine.max_context - 1):
        angles = position * rope.inv_freq.astype(np.float64)
        cosine, sine = written(tables, engine, position)
        # Angles are float32: of 1023, half of its last digit is 3e-5.
        np.testing.assert_allclose(cosine, rope.scaling * np.cos(angles), atol=1e-4)
        np.testing.assert_allclose(sine, rope.scaling * np.sin(angles), atol=1e-4)


def test_one_run_computes_many_positions(bundles: Bundles, monkeypatch: pytest.MonkeyPatch) -> None:
    engine, runs = native_engine(bundles, "longrope"), list[int]()
    compute = RotaryTables._compute

    def counted(tables: RotaryTables, first: int) -> None:
        runs.append(first)
        compute(tables, first)

    monkeypatch.setattr(RotaryTables, "_compute", counted)
    tables = rotary_tables(engine)
    for position in range(10, 2 * POSITIONS + 11):
        written(tables, engine, position)
    assert runs == [10, 10 + POSITIONS, 10 + 2 * POSITIONS]
