from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import pytest

from cpm_edge.runtimes import open_engine, ort
from cpm_edge.runtimes.errors import BackendError
from cpm_edge.runtimes.ort import OnnxRuntimeSession
from tests.runtimes.engine_checks import TOLERANCE, with_damaged, without_module
from tests.support.bundles import Bundles
from tests.support.checkpoints import prompt


@pytest.mark.parametrize("variant", ["llama", "sparse", "minicpm3"])
def test_buffers_grow_by_doubling_and_keep_their_rows(
    bundles: Bundles, variant: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ort, "FIRST_CAPACITY", 20)
    # Latent layers have one row a token for all heads.
    row = {"llama": 3 * 2 * 2 * 32 * 4, "sparse": 2 * 2 * 2 * 16 * 4, "minicpm3": 2 * 56 * 4}[variant]
    # Buffers of sparse layers are whole blocks of 16.
    usual = [20, 20, 40, 80, 333]
    expected = {"llama": usual, "sparse": [32, 32, 32, 64, 336], "minicpm3": usual}[variant]
    with bundles.engine(variant, "ort").session() as session:
        capacities, logits, start = [session.cache_bytes() / row], [], 0
        for stop in (20, 21, 60, 333):
            logits.append(session.forward(bundles.prompt[start:stop], "all"))
            capacities.append(session.cache_bytes() / row)
            start = stop
        assert capacities == expected
        np.testing.assert_allclose(
            np.concatenate(logits), bundles.reference(variant).logits, atol=2e-3, rtol=0
        )


def test_buffers_do_not_outgrow_the_context(bundles: Bundles, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ort, "FIRST_CAPACITY", 20)
    engine = open_engine(bundles.open("llama", "ort"), max_context=50)
    with engine.session() as session:
        session.forward(bundles.prompt[:45])
        session.forward(bundles.prompt[45:46])
        assert session.cache_bytes() == 50 * 3 * 2 * 2 * 32 * 4
    engine.close()


def test_a_clone_has_buffers_of_its_own(bundles: Bundles) -> None:
    with bundles.engine("llama", "ort").session() as session:
        session.forward(bundles.prompt[:40])
        before = session.forward(bundles.prompt[40:41])
        session.rewind(1)
        with session.fork() as twin:
            twin.rewind(40)
            twin.forward(prompt(60, seed=8))
            assert session.cache_bytes() == twin.cache_bytes()
        np.testing.assert_array_equal(session.forward(bundles.prompt[40:41]), before)


def test_sessions_of_one_engine_do_not_meet(bundles: Bundles) -> None:
    engine = bundles.engine("sparse", "ort")
    with engine.session() as first, engine.session() as second:
        for start in range(0, 120, 30):
            first.forward(bundles.prompt[start : start + 30])
            second.forward(bundles.prompt[::-1][start : start + 30])
        got = first.forward(bundles.prompt[120:121])
        np.testing.assert_allclose(got, bundles.reference("sparse").logits[120], atol=2e-3)


def test_closing_gives_the_buffers_back(bundles: Bundles) -> None:
    session = bundles.engine("llama", "ort").session()
    assert session.cache_bytes() > 0
    session.close()
    session.close()
    assert session.cache_bytes() == 0 and session.closed
    with pytest.raises(BackendError, match="this session is closed"):
        session.forward([1])


def test_the_keys_of_a_layer(bundles: Bundles) -> None:
    with bundles.engine("llama", "ort").session() as session:
        assert isinstance(session, OnnxRuntimeSession)
        session.forward(bundles.prompt[:30])
        keys = session.layer_keys(2).copy()
        assert keys.shape == (2, 30, 32)
        session.rewind(10)
        np.testing.assert_allclose(session.layer_keys(2), keys[:, :20], atol=TOLERANCE)


def test_facts_for_reports(bundles: Bundles) -> None:
    engine = open_engine(bundles.open("llama", "ort"), threads=1, max_context=100)
    facts = engine.info()
    assert facts["engine"] == "onnxruntime" and facts["version"][0].isdigit()
    assert (facts["device"], facts["threads"], facts["max_context"]) == ("CPU", 1, 100)
    engine.close()


def test_devices(bundles: Bundles) -> None:
    bundle = bundles.open("llama", "ort")
    with pytest.raises(BackendError, match="device: expected CPU or cuda for an ort bundle, got NPU"):
        open_engine(bundle, device="NPU")
    open_engine(bundle, device="cpu").close()


def test_cuda_without_its_provider_is_an_error(bundles: Bundles, monkeypatch: pytest.MonkeyPatch) -> None:
    import onnxruntime

    monkeypatch.setattr(onnxruntime, "get_available_providers", lambda: ["CPUExecutionProvider"])
    with pytest.raises(BackendError, match="device cuda: onnxruntime has no CUDAExecutionProvider") as caught:
        open_engine(bundles.open("llama", "ort"), device="cuda")
    assert caught.value.hint is not None and "ort-gpu" in caught.value.hint


def test_a_provider_that_does_not_come_up_is_an_error(
    bundles: Bundles, monkeypatch: pytest.MonkeyPatch
) -> None:
    """onnxruntime falls back to the CPU when CUDA's libraries are missing; that must not pass silently."""
    import onnxruntime

    both = ["CUDAExecutionProvider", "CPUExecutionProvider"]
    monkeypatch.setattr(onnxruntime, "get_available_providers", lambda: both)
    original = onnxruntime.InferenceSession
    monkeypatch.setattr(
        onnxruntime, "InferenceSession", lambda path, options, providers: original(path, options, both[1:])
    )
    with pytest.raises(BackendError, match="device cuda: onnxruntime fell back to CPUExecutionProvider"):
        open_engine(bundles.open("llama", "ort"), device="cuda")


def test_a_missing_onnxruntime(bundles: Bundles, monkeypatch: pytest.MonkeyPatch) -> None:
    bundle = bundles.open("llama", "ort")
    without_module(monkeypatch, "onnxruntime")
    with pytest.raises(BackendError, match="'onnxruntime' is needed here and is not installed") as caught:
        open_engine(bundle)
    assert caught.value.hint == 'pip install "cpm-edge[ort]"'


def test_an_old_onnxruntime(bundles: Bundles) -> None:
    bundle = bundles.open("llama", "ort")
    needs_more = dataclasses.replace(bundle.manifest, engine=bundle.manifest.engine | {"requires": ">=99.1"})
    with pytest.raises(BackendError, match=r"onnxruntime: expected version >=99\.1, got"):
        open_engine(dataclasses.replace(bundle, manifest=needs_more))


@pytest.mark.parametrize("content", [b"", b"not a model", b"\x08\x0a" * 40])
def test_a_damaged_model(bundles: Bundles, tmp_path: Path, content: bytes) -> None:
    bundle = with_damaged(bundles.open("llama", "ort"), tmp_path / "bad", "model.onnx", content)
    with pytest.raises(BackendError, match=r"onnxruntime cannot load model\.onnx"):
        open_engine(bundle)
