"""Sessions on a fake GPU that computes: what they return is what the model says without any cache."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any

import numpy as np
import pytest

from cpm_edge.runtimes import load, open_engine
from cpm_edge.runtimes.bundle import Bundle
from cpm_edge.runtimes.errors import BackendError, ContextError
from cpm_edge.runtimes.session import FloatArray
from cpm_edge.runtimes.tensorrt.build import DECODE, PREFILL
from cpm_edge.runtimes.tensorrt.engine import TensorRtEngine
from tests.runtimes.tensorrt.conftest import Board, MakeBundle
from tests.runtimes.tensorrt.tiny_model import CHUNK, VOCAB, TinyModel

TOKENS = [int(token) for token in np.random.default_rng(3).integers(0, VOCAB, 40)]
MODELS = [
    pytest.param({"form": "rows_out"}, id="rows-out"),
    pytest.param({"form": "in_place"}, id="in-place"),
    pytest.param({"form": "rows_out", "recurrent": True}, id="rows-out-recurrent"),
    pytest.param({"form": "in_place", "recurrent": True}, id="in-place-recurrent"),
    pytest.param({"form": "rows_out", "host_embedding": False}, id="token-ids"),
]


@contextmanager
def opened(bundle: Bundle, board: Board) -> Iterator[TensorRtEngine]:
    """The engine; afterwards nothing of it may be left on the device."""
    engine = open_engine(bundle)
    assert isinstance(engine, TensorRtEngine)
    try:
        yield engine
    finally:
        engine.close()
    assert board.cuda.live == 0


def assert_logits(got: FloatArray, expected: FloatArray) -> None:
    """float16 activations: errors of a few ulps (2^-11) of the largest value; a wrong token is a tenth."""
    assert got.dtype == np.float32
    assert np.abs(got - expected).max() < 0.01 * np.abs(expected).max()


@pytest.mark.parametrize("options", MODELS)
def test_prefill_in_chunks_and_decode_give_the_logits_of_the_model(
    options: dict[str, Any], board: Board, tiny_bundle: MakeBundle
) -> None:
    tiny = TinyModel(**options)
    expected = tiny.logits(TOKENS)
    with opened(tiny_bundle(tiny), board) as engine, engine.session() as session:
        got = [session.forward(TOKENS[:21])]
        got += [session.forward([token]) for token in TOKENS[21:]]
        assert_logits(np.stack(got), expected[20:])
        assert session.position == len(TOKENS)
    chunks = [shapes[engine.io.tokens][1] for profile, shapes in board.tensorrt.steps if profile == PREFILL]
    assert chunks == [CHUNK, CHUNK, 5]


def test_another_token_changes_more_than_the_tolerance() -> None:
    tiny = TinyModel(recurrent=True)
    changed = tiny.logits([(TOKENS[0] + 1) % VOCAB, *TOKENS[1:]])
    with pytest.raises(AssertionError):
        assert_logits(changed[-1], tiny.logits(TOKENS)[-1])


@pytest.mark.parametrize("options", MODELS)
def test_a_rewind_continues_as_if_the_tokens_had_not_been(
    options: dict[str, Any], board: Board, tiny_bundle: MakeBundle
) -> None:
    tiny = TinyModel(**options)
    with opened(tiny_bundle(tiny), board) as engine, engine.session() as session:
        session.forward(TOKENS[:20])
        session.forward([1])
        session.forward([2])
        session.rewind(9)
        assert session.position == 13
        rest = [session.forward([token]) for token in TOKENS[13:20]]
        assert_logits(np.stack(rest), tiny.logits(TOKENS[:20])[13:])
        session.reset()
        assert_logits(session.forward(TOKENS[5:12]), tiny.logits(TOKENS[5:12])[-1])


@pytest.mark.parametrize("options", MODELS)
def test_a_fork_goes_its_own_way(options: dict[str, Any], board: Board, tiny_bundle: MakeBundle) -> None:
    tiny = TinyModel(**options)
    mine, theirs = TOKENS[:25], [*TOKENS[:15], *TOKENS[30:40]]
    with opened(tiny_bundle(tiny), board) as engine, engine.session() as session:
        session.forward(TOKENS[:13])
        session.forward(TOKENS[13:14])
        session.forward(TOKENS[14:15])  # an odd number of steps: states lie in the second buffer
        twin = session.fork()
        got, other = [], []
        for index in range(15, 25):  # in turns, on the same contexts and staging buffers
            got.append(session.forward([mine[index]]))
            other.append(twin.forward([theirs[index]]))
        assert_logits(np.stack(got), tiny.logits(mine)[15:])
        assert_logits(np.stack(other), tiny.logits(theirs)[15:])
        session.close()
        assert_logits(twin.forward([7]), tiny.logits([*theirs, 7])[-1])


def test_all_logits_come_in_steps_of_what_the_profile_allows(
    board: Board, tiny_bundle: MakeBundle, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("cpm_edge.runtimes.tensorrt.build._LOGIT_BYTES", 3 * 4 * VOCAB)
    tiny = TinyModel(recurrent=True)
    with opened(tiny_bundle(tiny), board) as engine, engine.session() as session:
        assert engine.io.logit_rows == 3
        assert_logits(session.forward(TOKENS[:19], logits="all"), tiny.logits(TOKENS[:19]))
    rows = [shapes["logit_rows"][0] for _, shapes in board.tensorrt.steps]
    assert rows == [3, 3, 2, 3, 3, 2, 3]


@pytest.mark.parametrize("options", MODELS)
def test_decode_is_captured_after_its_first_step_and_launched_from_then_on(
    options: dict[str, Any], board: Board, tiny_bundle: MakeBundle
) -> None:
    tiny = TinyModel(**options)
    expected = tiny.logits(TOKENS)
    # A state that changes buffers needs a graph for each of the two.
    buffers = 2 if options.get("recurrent") and tiny.form == "rows_out" else 1
    with opened(tiny_bundle(tiny), board) as engine, engine.session() as session:
        session.forward(TOKENS[:6])
        board.cuda.calls.clear()
        board.tensorrt.steps.clear()
        got = [session.forward([token]) for token in TOKENS[6:16]]
        assert_logits(np.stack(got), expected[6:16])
        calls = board.cuda.calls
        assert calls.count("cudaGraphInstantiate") == buffers
        assert calls.count("cudaGraphLaunch") == 10 - buffers
        assert calls.index("cudaStreamSynchronize") < calls.index("cudaStreamBeginCapture")
        # Once for real and once into the capture, for each graph.
        assert [profile for profile, _ in board.tensorrt.steps] == [DECODE] * 2 * buffers
        assert engine.info()["cuda_graph"] is True
        session.fork().forward([1])
        assert calls.count("cudaGraphInstantiate") == buffers + 1


def test_a_prefill_between_decode_steps_leaves_the_graph_valid(board: Board, tiny_bundle: MakeBundle) -> None:
    tiny = TinyModel("in_place")
    with opened(tiny_bundle(tiny), board) as engine, engine.session() as session:
        got = [session.forward(part) for part in (TOKENS[:3], [9], [8], TOKENS[3:20], [7], [6])]
        sequence = [*TOKENS[:3], 9, 8, *TOKENS[3:20], 7, 6]
        ends = [2, 3, 4, 21, 22, 23]
        assert_logits(np.stack(got), tiny.logits(sequence)[ends])
        assert board.cuda.calls.count("cudaGraphInstantiate") == 1


def test_an_engine_that_cannot_be_captured_runs_on_and_says_so(board: Board, tiny_bundle: MakeBundle) -> None:
    board.tensorrt.refuse_capture = True
    tiny = TinyModel()
    with opened(tiny_bundle(tiny), board) as engine, engine.session() as session:
        session.forward(TOKENS[:4])
        with pytest.warns(RuntimeWarning, match="without a CUDA graph.*CaptureUnsupported"):
            first = session.forward(TOKENS[4:5])
        got = [first, *(session.forward([token]) for token in TOKENS[5:9])]
        assert_logits(np.stack(got), tiny.logits(TOKENS)[4:9])
        assert engine.info()["cuda_graph"] is False
    assert "cudaGraphLaunch" not in board.cuda.calls


def test_a_step_that_fails_leaves_the_tokens_before_it(board: Board, tiny_bundle: MakeBundle) -> None:
    tiny = TinyModel(recurrent=True)
    with opened(tiny_bundle(tiny), board) as engine, engine.session() as session:
        session.forward(TOKENS[:10])
        board.tensorrt.step_errors.append(
            "[executionContext.cpp::enqueue] Error Code 1: Cuda Runtime (broken)"
        )
        with pytest.raises(BackendError, match=r"failed at position 10.*did not run\n.*Cuda Runtime"):
            session.forward(TOKENS[10:14])
        assert session.position == 10
        assert_logits(session.forward(TOKENS[10:14]), tiny.logits(TOKENS[:14])[-1])


def test_a_refused_alias_has_its_own_advice(board: Board, tiny_bundle: MakeBundle) -> None:
    with opened(tiny_bundle(TinyModel("in_place")), board) as engine, engine.session() as session:
        board.tensorrt.step_errors.append(
            "present_key: expected the address of key_cache, because the cache is updated in place; build "
            "the engine with the preview feature ALIASED_PLUGIN_IO_10_03 and bind both to one buffer"
        )
        with pytest.raises(BackendError) as caught:
            session.forward(TOKENS[:4])
        assert "docs/jetson.md" in str(caught.value.hint)


def test_caches_and_states_can_be_read(board: Board, tiny_bundle: MakeBundle) -> None:
    tiny = TinyModel(recurrent=True)
    with opened(tiny_bundle(tiny), board) as engine, engine.session() as session:
        session.forward(TOKENS[:11])
        x = tiny.weights["embedding"][TOKENS[:11]] + tiny.weights["positions"][:11]
        keys = (x @ tiny.weights["k"]).reshape(11, 2, 16).transpose(1, 0, 2)
        np.testing.assert_allclose(session.layer_keys(0), keys, atol=0.05)
        assert session.layer_state(1).shape == (1, 16, 16)
        assert session.state_bytes() == 4 * 16 * 16
        assert session.cache_bytes() == 2 * 2 * 64 * 16 * 2 + 2 * 1024 + session.snapshot_bytes()


def test_an_int8_embedding_is_scaled_row_by_row(board: Board, tiny_bundle: MakeBundle) -> None:
    tiny = TinyModel()
    rng = np.random.default_rng(0)
    codes = rng.integers(-127, 128, (VOCAB, tiny.hidden)).astype(np.int8)
    scales = rng.uniform(0.02, 0.1, VOCAB).astype(np.float16)
    tiny.weights["embedding"] = codes * scales.astype(np.float32)[:, None]
    before = b"something else"
    entry = {"file": "embedding.bin", "format": "int8", "rows": VOCAB, "columns": tiny.hidden}
    entry |= {"offset": len(before), "scales": {"offset": len(before) + codes.nbytes, "dtype": "float16"}}
    data = before + codes.tobytes() + scales.tobytes()
    bundle = tiny_bundle(tiny, extra={"embedding.bin": data}, embedding=entry)
    with opened(bundle, board) as engine, engine.session() as session:
        assert_logits(session.forward(TOKENS[:12]), tiny.logits(TOKENS[:12])[-1])


def test_a_smaller_context_is_kept_and_a_larger_one_refused(board: Board, tiny_bundle: MakeBundle) -> None:
    bundle = tiny_bundle(TinyModel())
    with load(bundle.path, max_context=12) as model:
        assert model.engine.info()["max_context"] == 12
        session = model.session()
        session.forward(TOKENS[:12])
        with pytest.raises(ContextError):
            session.forward([1])
    with pytest.raises(ContextError, match="1 to 64"):
        load(bundle.path, max_context=65)


def test_memory_that_ends_at_the_second_session_is_an_error_with_numbers(
    board: Board, tiny_bundle: MakeBundle
) -> None:
    with opened(tiny_bundle(TinyModel()), board) as engine, engine.session():
        board.cuda.total = sum(map(len, board.cuda.blocks["device"].values())) + 5000
        with pytest.raises(BackendError, match=r"no device memory for cache 0\.\w+: .* MiB asked, .* free"):
            engine.session()
        before = board.cuda.live
        with pytest.raises(BackendError):
            engine.session()
        assert board.cuda.live == before


def test_a_session_that_is_dropped_gives_its_memory_to_the_next(
    board: Board, tiny_bundle: MakeBundle
) -> None:
    with opened(tiny_bundle(TinyModel()), board) as engine:
        engine.session().forward([1])
        gc.collect()
        before = len(board.cuda.blocks["device"])
        with engine.session():
            assert len(board.cuda.blocks["device"]) == before


def test_closing_the_engine_closes_its_sessions(board: Board, tiny_bundle: MakeBundle) -> None:
    with opened(tiny_bundle(TinyModel()), board) as engine:
        session = engine.session()
        session.forward([1])
        engine.close()
        assert session.closed
        with pytest.raises(BackendError, match="closed"):
            engine.session()


def test_two_threads_take_turns(board: Board, tiny_bundle: MakeBundle) -> None:
    tiny = TinyModel()
    expected = tiny.logits(TOKENS)
    with opened(tiny_bundle(tiny), board) as engine, ThreadPoolExecutor(2) as pool:

        def run(_: int) -> FloatArray:
            with engine.session() as session:
                return np.stack([session.forward([token]) for token in TOKENS])

        for got in pool.map(run, range(2)):
            assert_logits(got, expected)
