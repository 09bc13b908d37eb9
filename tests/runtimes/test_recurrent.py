"""Bundles with recurrent layers on every engine: states, snapshots, and what a failed step leaves."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from cpm_edge.runtimes import session as session_module
from cpm_edge.runtimes.session import Session
from tests.support.bundles import NATIVE, Bundles

STATES = 2 * 4 * 24 * 24 * 4  # two lightning layers of the variant "sala", float32
ENGINES: dict[str, dict[str, Any]] = {
    "ort": {"target": "ort"},
    "stock": {"target": "aipc"},
    "native": {"target": "aipc", **NATIVE},
}
engines = pytest.mark.parametrize("engine", ENGINES)


def open_session(bundles: Bundles, engine: str, variant: str = "sala") -> Session:
    return bundles.engine(variant, **ENGINES[engine]).session()


@engines
def test_a_snapshot_brings_the_very_state_back(bundles: Bundles, engine: str) -> None:
    ids = bundles.prompt
    with open_session(bundles, engine) as session:
        session.forward(ids[:150])
        state = session.layer_state(2).copy()
        expected = session.forward(ids[150:151]).copy()
        session.forward(ids[:5])
        session.rewind(6)
        assert session.pending == 0
        np.testing.assert_array_equal(session.layer_state(2), state)
        np.testing.assert_array_equal(session.forward(ids[150:151]), expected)


@engines
def test_between_snapshots_the_tokens_are_computed_again(bundles: Bundles, engine: str) -> None:
    ids = bundles.prompt
    with open_session(bundles, engine) as session, open_session(bundles, engine) as fresh:
        fresh.forward(ids[:130])
        expected = fresh.forward(ids[130:200], "all").copy()
        session.forward(ids[:200])
        session.rewind(70)
        assert (session.position, session.pending) == (130, 130)
        with session.fork() as twin:
            np.testing.assert_array_equal(twin.forward(ids[130:200], "all"), expected)
        np.testing.assert_array_equal(session.forward(ids[130:200], "all"), expected)


@engines
def test_a_fork_has_states_of_its_own(bundles: Bundles, engine: str) -> None:
    ids = bundles.prompt
    with open_session(bundles, engine) as session:
        session.forward(ids[:100])
        state = session.layer_state(0).copy()
        with session.fork() as twin:
            twin.forward(ids[:50])
            np.testing.assert_array_equal(session.layer_state(0), state)
            twin.rewind(50)
            np.testing.assert_array_equal(twin.layer_state(0), state)
            expected = session.forward(ids[100:101]).copy()
            np.testing.assert_array_equal(twin.forward(ids[100:101]), expected)


@engines
def test_a_reset_session_is_new(bundles: Bundles, engine: str) -> None:
    ids = bundles.prompt
    with open_session(bundles, engine) as session, open_session(bundles, engine) as fresh:
        session.forward(ids[::-1])
        session.reset()
        assert (session.position, session.pending, session.snapshot_bytes()) == (0, 0, 0)
        np.testing.assert_array_equal(session.forward(ids[:90], "all"), fresh.forward(ids[:90], "all"))


@engines
def test_a_step_that_failed_after_it_changed_the_states(
    bundles: Bundles, engine: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """States are written in place: an interrupt behind the engine's back must not count twice."""
    ids = bundles.prompt
    with open_session(bundles, engine) as session, open_session(bundles, engine) as fresh:
        session.forward(ids[:90])
        fresh.forward(ids[:90])
        step = session._step

        def interrupted(*arguments: Any) -> Any:
            step(*arguments)
            raise KeyboardInterrupt

        with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
            patch.setattr(session, "_step", interrupted)
            session.forward(ids[90:120])
        assert (session.position, session.pending) == (90, 0)
        np.testing.assert_array_equal(session.forward(ids[90:120]), fresh.forward(ids[90:120]))


@engines
def test_states_and_snapshots_are_counted(
    bundles: Bundles, engine: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(session_module, "INTERVAL", 16)
    info = bundles.engine("sala", **ENGINES[engine]).info()
    assert info["state_bytes"] == STATES and info["snapshot_bytes_limit"] == 16 * STATES
    with open_session(bundles, engine) as session:
        empty = session.cache_bytes()
        assert empty >= STATES and session.snapshot_bytes() == 0
        for token in bundles.prompt[:300]:
            session.forward([token])
        assert session.snapshot_bytes() == 16 * STATES
        assert session.cache_bytes() >= 17 * STATES
        session.reset()
        assert session.snapshot_bytes() == 0


@engines
def test_models_without_recurrent_layers_have_no_states(bundles: Bundles, engine: str) -> None:
    variant = "sparse"
    assert "state_bytes" not in bundles.engine(variant, **ENGINES[engine]).info()
    with open_session(bundles, engine, variant) as session:
        session.forward(bundles.prompt[:40])
        session.rewind(10)
        assert session.snapshot_bytes() == session.pending == 0


@engines
def test_states_stay_float32(bundles: Bundles, engine: str) -> None:
    """A state's smallest decay adds up over 256 tokens: eight bits of a mantissa would lose most of it."""
    options = ENGINES[engine] | ({"kv_cache": "fp16"} if engine == "stock" else {})
    with bundles.engine("sala", **options).session() as session:
        session.forward(bundles.prompt[:50])
        (first, *_) = session._save_states()
        assert first.dtype == np.float32
        assert (first != first.astype(np.float16)).mean() > 0.9


def test_the_manifest_says_which_layers_have_what(bundles: Bundles) -> None:
    for options in ENGINES.values():
        cache = bundles.open("sala", **options).manifest.cache
        assert (cache["layers"], cache["kv_heads"], cache["head_dim"]) == (4, 2, 16)
        assert cache["recurrent"] == {
            "layers": [0, 2], "heads": 4, "key_size": 24, "value_size": 24, "dtype": "float32",
        }  # fmt: skip
        assert "recurrent" not in bundles.open("sparse", **options).manifest.cache
