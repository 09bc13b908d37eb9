"""A program and its sessions: what is refused, what lives how long, and two sessions at once."""

from __future__ import annotations

import gc
import threading
import weakref
from collections.abc import Callable, Iterator

import numpy as np
import numpy.typing as npt
import pytest

from cpm_edge.plugins.matmul_nbits.spec import NBitsShape
from cpm_edge.plugins.native import NativeError
from cpm_edge.plugins.program import ABSENT, RESULT, Norm, Program, Values
from cpm_edge.plugins.session import NativeSession
from cpm_edge.plugins.sparse_attention.cache import AttentionCache
from cpm_edge.plugins.sparse_attention.native import CAttentionSpec
from cpm_edge.plugins.sparse_attention.spec import SparseAttentionSpec
from tests.plugins.matmul_nbits.test_native import Weight
from tests.plugins.program_cases import (
    Board,
    Floats,
    latent_constants,
    make_norm,
    normal,
    recurrent_constants,
    rotations,
    weights,
)
from tests.plugins.sparse_attention.test_native_latent import SMALL
from tests.plugins.sparse_attention.test_native_latent import make_case as make_latent_case

DENSE = SparseAttentionSpec.dense(3, 1, 0.15)


@pytest.fixture
def board() -> Iterator[Board]:
    made = Board(threads=2, to_result=False)
    yield made
    made.session.close()


def add_attention(board: Board, layer: int = 1) -> None:
    spec = CAttentionSpec(head_size=40, **DENSE.attributes())
    board.program.attention(
        layer, spec, board.put(normal(5 * 40)), (ABSENT, ABSENT), board.y(120), gated=False
    )


def add_recurrent(board: Board) -> None:
    rows, kept = recurrent_constants(3, 24)
    rotation = board.put(normal(12)), board.put(normal(12))
    board.program.recurrent(1, rows, board.put(normal(4 * 72)), rotation, board.y(72), keep=kept)


def add_latent(board: Board) -> None:
    case = make_latent_case(SMALL, 1, 0)
    rotation = board.put(case.rotation[0]), board.put(case.rotation[1])
    rows = board.put(case.query), board.put(case.latent)
    board.program.latent(1, *latent_constants(case), rows, rotation, board.y(80), keep=case)


@pytest.mark.parametrize("add", [add_attention, add_recurrent, add_latent])
def test_a_layer_without_cache_or_state_is_refused(board: Board, add: Callable[[Board], None]) -> None:
    add(board)
    with pytest.raises(NativeError, match="token 7: the kernels do not take this shape"):
        board.run(7)


@pytest.mark.parametrize("layer", [-1, 2])
def test_a_layer_that_the_session_does_not_have(board: Board, layer: int) -> None:
    add_attention(board, layer)
    with pytest.raises(NativeError, match="token 0: the kernels do not take this shape"):
        board.run()


@pytest.mark.parametrize("add", [add_attention, add_latent])
def test_a_full_cache_is_refused(board: Board, add: Callable[[Board], None]) -> None:
    latent = AttentionCache(np.zeros((1, 1, 16, SMALL.width), np.float16), None, None)
    dense = AttentionCache.empty(DENSE, 1, 16, 40)
    board.session.set_cache(1, latent if add is add_latent else dense)
    add(board)
    board.run(15)
    with pytest.raises(NativeError, match="token 16: the new rows do not fit the cache"):
        board.run(16)


def test_what_follows_a_refused_op_is_not_run(board: Board) -> None:
    add_attention(board)
    board.program.gather(board.put(normal(3)), np.arange(3, dtype=np.int32), RESULT)
    result = np.full(3, np.nan, np.float32)
    with pytest.raises(NativeError):
        board.program.run(board.session, 0, board.values.array(), result)
    assert np.isnan(result).all()


def test_a_closed_session_is_refused(board: Board) -> None:
    board.program.gather(board.put(normal(3)), np.arange(3, dtype=np.int32), board.y(3))
    board.run()
    board.session.close()
    with pytest.raises(NativeError, match="the native session is closed"):
        board.run()


def test_a_program_keeps_its_weights(board: Board) -> None:
    gate, up = weights((4, 32, True), 2)
    norm, columns = make_norm(board, normal(gate.shape.cols)), np.arange(3, dtype=np.int32)
    board.program.norm_gated(norm, gate.shape, gate.panels, up.panels, board.y(37))
    board.program.gather(norm.x, columns, board.y(3))
    kept = [weakref.ref(array) for array in (norm.weight, gate.panels, up.panels, columns)]
    del gate, up, norm, columns
    gc.collect()
    assert all(array() is not None for array in kept)
    del board.program
    gc.collect()
    assert not any(array() is not None for array in kept)


HIDDEN, HEADS, SIZE = 48, 3, 16
SMALL_DENSE = SparseAttentionSpec.dense(HEADS, 1, 0.25)


class TwoLayers:
    """A program of a layer with a cache and one with a state; 48 floats become 48."""

    def __init__(self) -> None:
        self.program, self.values = Program(), Values()
        place = self.values.fresh
        self.x, rotation = place(HIDDEN), (place(SIZE // 2), place(SIZE // 2))
        self.tables = rotation
        qkv, mixed = place(5 * SIZE), place(4 * HIDDEN)
        attended, inner, middle = place(HIDDEN), place(96), place(HIDDEN)
        spec = CAttentionSpec(head_size=SIZE, **SMALL_DENSE.attributes())
        rows, kept = recurrent_constants(HEADS, SIZE)
        add, norm = self.program.linear_add, Norm(self.x, np.ones(HIDDEN, np.float32), 1e-5)
        self.program.norm_linear(norm, *self._weight(5 * SIZE), qkv)
        self.program.attention(0, spec, qkv, rotation, attended, gated=False)
        add(attended, self.x, 1.0, *self._weight(HIDDEN), middle)
        norm = Norm(middle, norm.weight, 1e-5)
        shape, gate = self._weight(96)
        self.program.norm_gated(norm, shape, gate, self._weight(96)[1], inner)
        add(inner, middle, 1.0, *self._weight(HIDDEN, 96), middle)
        self.program.norm_linear(norm, *self._weight(4 * HIDDEN), mixed)
        self.program.recurrent(1, rows, mixed, rotation, attended, keep=kept)
        add(attended, middle, 1.0, *self._weight(HIDDEN), RESULT)

    def _weight(self, rows: int, cols: int = HIDDEN) -> tuple[NBitsShape, npt.NDArray[np.uint8]]:
        weight = Weight(rows, cols, 8, 0, True, seed=rows + cols)
        return weight.shape, weight.panels

    def answers(self, seed: int, threads: int, steps: int = 40) -> Floats:
        """(steps, 48): each step reads what the one before gave."""
        session, array = NativeSession(threads, layers=2), self.values.array()
        cache = AttentionCache.empty(SMALL_DENSE, 1, 64, SIZE)
        state = np.zeros((HEADS, SIZE, SIZE), np.float32)
        session.set_cache(0, cache)
        session.set_state(1, state)
        x, found = normal(HIDDEN, seed=seed), np.full((steps, HIDDEN), np.nan, np.float32)
        for past in range(steps):
            array[self.x : self.x + HIDDEN] = x / np.abs(x).max()
            for offset, table in zip(self.tables, rotations(SIZE), strict=True):
                array[offset : offset + SIZE // 2] = table
            self.program.run(session, past, array, found[past])
            x = found[past]
        session.close()
        return found


@pytest.mark.parametrize("threads", [1, 3])
def test_two_sessions_of_one_program_answer_at_once_as_alone(threads: int) -> None:
    model = TwoLayers()
    alone = [model.answers(seed, 2) for seed in (0, 1)]
    assert np.isfinite(alone).all() and np.abs(alone[0] - alone[1]).max() > 0.1
    found: dict[int, Floats] = {}
    workers = [
        threading.Thread(target=lambda seed=seed: found.update({seed: model.answers(seed, threads)}))
        for seed in (0, 1)
    ]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    for seed in (0, 1):
        np.testing.assert_array_equal(found[seed], alone[seed])
