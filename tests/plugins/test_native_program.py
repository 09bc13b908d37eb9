"""Each op of a program against the single kernels, bit for bit."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest

from cpm_edge.plugins.linear_attention.recurrent import gate_output, recurrent_attention
from cpm_edge.plugins.matmul_nbits import native as nbits
from cpm_edge.plugins.matmul_nbits.native import c_shape
from cpm_edge.plugins.mixture_of_experts.native import CExperts, mixture_of_experts
from cpm_edge.plugins.mixture_of_experts.spec import MixtureOfExpertsSpec
from cpm_edge.plugins.native import ThreadPool, pointer
from cpm_edge.plugins.program import ABSENT
from cpm_edge.plugins.sparse_attention.cache import CACHE_TYPES, AttentionCache
from cpm_edge.plugins.sparse_attention.native import CAttentionSpec, sparse_attention
from cpm_edge.plugins.sparse_attention.native_latent import latent_attention
from cpm_edge.plugins.sparse_attention.spec import SparseAttentionSpec
from cpm_edge.plugins.sparse_mlp.native import CSparseMlpWeights, Sparsity, sparse_mlp
from tests.plugins.linear_attention.cases import make_spec
from tests.plugins.linear_attention.test_native_recurrent import make_inputs
from tests.plugins.mixture_of_experts.test_native import Layer
from tests.plugins.program_cases import (
    Board,
    Scheme,
    latent_constants,
    make_norm,
    normal,
    normalized,
    recurrent_constants,
    rotations,
    weights,
)
from tests.plugins.sparse_attention.cases import small_spec
from tests.plugins.sparse_attention.native_cases import make_case
from tests.plugins.sparse_attention.test_native_latent import SMALL
from tests.plugins.sparse_attention.test_native_latent import make_case as make_latent_case
from tests.plugins.sparse_mlp.test_native import Mlp

SCHEMES = [(4, 32, True), (4, 32, False), (2, 128, True), (8, 0, True)]
IDS = [f"bits{bits}-g{group}-{'sym' if symmetric else 'asym'}" for bits, group, symmetric in SCHEMES]
BY_SCHEME = pytest.mark.parametrize("scheme", SCHEMES, ids=IDS)


@pytest.fixture(params=[(1, False), (3, False), (3, True)], ids=["1-thread", "3-threads", "result"])
def board(request: pytest.FixtureRequest) -> Iterator[Board]:
    made = Board(*request.param)
    yield made
    made.session.close()


@pytest.fixture(scope="module")
def pool() -> Iterator[ThreadPool]:
    with ThreadPool(2) as threads:
        yield threads


@BY_SCHEME
def test_norm_linear(board: Board, pool: ThreadPool, scheme: Scheme) -> None:
    (weight,) = weights(scheme, 1)
    x = normal(weight.shape.cols)
    norm = make_norm(board, x)
    board.program.norm_linear(norm, weight.shape, weight.panels, board.y(37))
    expected = nbits.matmul(pool, weight.shape, weight.panels, normalized(pool, norm, x))
    np.testing.assert_array_equal(board.run(), expected[0])


@BY_SCHEME
def test_linear_add(board: Board, pool: ThreadPool, scheme: Scheme) -> None:
    (weight,) = weights(scheme, 1)
    x, residual = normal(1, weight.shape.cols), normal(1, 37, seed=1)
    places = board.put(x), board.put(residual)
    board.program.linear_add(*places, 0.7, weight.shape, weight.panels, board.y(37))
    expected = nbits.matmul(pool, weight.shape, weight.panels, x, residual=residual, scale=0.7)
    np.testing.assert_array_equal(board.run(), expected[0])


@BY_SCHEME
def test_norm_gated(board: Board, pool: ThreadPool, scheme: Scheme) -> None:
    gate, up = weights(scheme, 2)
    x = normal(gate.shape.cols)
    norm = make_norm(board, x)
    board.program.norm_gated(norm, gate.shape, gate.panels, up.panels, board.y(37))
    expected = nbits.gated(pool, gate.shape, gate.panels, up.panels, normalized(pool, norm, x))
    np.testing.assert_array_equal(board.run(), expected[0])


@pytest.mark.parametrize(("hidden", "wide"), [(44, 100), (7, 33)])
def test_norm_experts(board: Board, pool: ThreadPool, hidden: int, wide: int) -> None:
    layer = Layer(MixtureOfExpertsSpec(5, 2), hidden, wide, (8, 0, True))
    x = normal(hidden)
    norm = make_norm(board, x)
    described = (c_shape(shape) for shape in layer.shapes)
    panels = (pointer(part, np.uint8) for part in layer.panels)
    experts = CExperts(5, 2, *described, *panels, pointer(layer.router, np.float32))
    board.program.norm_experts(norm, experts, 0.7, board.y(hidden), keep=layer)
    arguments: Any = (layer.spec, layer.shapes, layer.panels, layer.router, normalized(pool, norm, x))
    expected = mixture_of_experts(pool, *arguments, residual=x[None], scale=0.7)
    np.testing.assert_array_equal(board.run(), expected[0])


@pytest.mark.parametrize("scheme", [(4, 32, True), (8, 0, True)], ids=str)
def test_norm_sparse_mlp(board: Board, pool: ThreadPool, scheme: Scheme) -> None:
    mlp = Mlp(96, 160, scheme, threshold=0.5).native
    x, residual = normal(96), normal(1, 96, seed=1)
    norm = make_norm(board, x)
    shapes = (c_shape(shape) for shape in (mlp.gate_shape, mlp.up_shape, mlp.down_shape))
    parts = (pointer(part, np.uint8) for part in (mlp.gate, mlp.up, mlp.down))
    described = CSparseMlpWeights(*shapes, *parts, mlp.threshold)
    board.program.norm_sparse_mlp(norm, described, board.put(residual), 0.7, board.y(96), keep=mlp)
    row, count = normalized(pool, norm, x), Sparsity()
    expected = sparse_mlp(pool, mlp, row, residual=residual, scale=0.7, count=count)
    np.testing.assert_array_equal(board.run(), expected[0])
    assert 0 < count.active < count.neurons
    assert bytes(board.session.sparsity()) == bytes(count)


def test_gather(board: Board) -> None:
    x, columns = normal(19), np.array([18, 0, 7, 7, 3], np.int32)
    board.program.gather(board.put(x), columns, board.y(5))
    np.testing.assert_array_equal(board.run(), x[columns])


DENSE = SparseAttentionSpec.dense(3, 1, 0.15)
SPARSE = small_spec(14, 2, 24, topk=4, init_blocks=2, window_size=16)


@pytest.mark.parametrize("dtype", CACHE_TYPES)
@pytest.mark.parametrize("rotated", [False, True], ids=["plain", "rotated"])
@pytest.mark.parametrize("gated", [False, True], ids=["ungated", "gated"])
@pytest.mark.parametrize(
    ("spec", "size", "past"), [(DENSE, 40, 0), (DENSE, 40, 130), (SPARSE, 24, 63), (SPARSE, 24, 301)]
)
def test_attention(
    board: Board,
    pool: ThreadPool,
    spec: SparseAttentionSpec,
    size: int,
    past: int,
    gated: bool,
    rotated: bool,
    dtype: str,
) -> None:
    case, width = make_case(spec, 1, past, size, dtype=dtype), spec.num_heads * size
    parts, gate = case.rows.all(), normal(1, width, seed=2)
    mixed = np.concatenate([part[0] for part in (*parts, *([gate[None]] if gated else []))], 1)
    tables = rotations(size)
    cache, expected_cache = case.cache(), case.cache()
    board.session.set_cache(1, cache)
    rotation = (board.put(tables[0]), board.put(tables[1])) if rotated else (ABSENT, ABSENT)
    c_spec = CAttentionSpec(head_size=size, **spec.attributes())
    board.program.attention(1, c_spec, board.put(mixed), rotation, board.y(width), gated=gated)

    given = (tables[0][None, None], tables[1][None, None]) if rotated else None
    expected = sparse_attention(pool, spec, *parts, expected_cache, np.array([past]), rotation=given)[0]
    if gated:
        gate_output(pool, gate, expected)
    np.testing.assert_array_equal(board.run(past), expected[0])
    for name in ("key", "value", "key_scales", "value_scales", "pooled"):
        np.testing.assert_array_equal(getattr(cache, name), getattr(expected_cache, name))


@pytest.mark.parametrize(("heads", "size"), [(1, 2), (3, 24), (5, 10)])
def test_recurrent(board: Board, pool: ThreadPool, heads: int, size: int) -> None:
    case, spec = make_inputs(1, heads, size), make_spec(heads, size)
    state, expected_state = case.state.copy(), case.state.copy()
    board.session.set_state(1, state)
    rows, kept = recurrent_constants(heads, size)
    rotation = board.put(case.rotation[0]), board.put(case.rotation[1])
    board.program.recurrent(1, rows, board.put(case.mixed), rotation, board.y(heads * size), keep=kept)
    arguments = (case.norms, case.mixed, case.rotation, expected_state)
    expected = [recurrent_attention(pool, spec, *arguments) for _ in range(2)]
    for output in expected:
        np.testing.assert_array_equal(board.run(), output[0])
    np.testing.assert_array_equal(state, expected_state)


@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize("past", [0, 77])
def test_latent(board: Board, pool: ThreadPool, past: int, groups: int) -> None:
    case = make_latent_case(SMALL, 1, past, groups=groups)
    cache = case.cache.copy()
    board.session.set_cache(1, AttentionCache(cache[None, None], None, None))
    rotation = board.put(case.rotation[0]), board.put(case.rotation[1])
    rows, width = (board.put(case.query), board.put(case.latent)), SMALL.num_heads * SMALL.value_size
    board.program.latent(1, *latent_constants(case), rows, rotation, board.y(width), keep=case)
    arguments = (case.query, case.latent, case.norm, case.rotation, case.up, case.cache, past)
    expected = latent_attention(pool, SMALL, *arguments)
    np.testing.assert_array_equal(board.run(past), expected[0])
    np.testing.assert_array_equal(cache, case.cache)
