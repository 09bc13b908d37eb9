from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from cpm_edge.runtimes import open_engine
from cpm_edge.runtimes.errors import BackendError
from cpm_edge.runtimes.openvino.stock import OpenVinoSession
from tests.runtimes.engine_checks import TOLERANCE, with_damaged, without_module
from tests.support.bundles import Bundles
from tests.support.checkpoints import prompt


@pytest.mark.parametrize(("variant", "kv_cache", "item"), [("llama", "fp32", 4), ("sparse", "fp16", 2)])
def test_the_state_grows_with_the_sequence(bundles: Bundles, variant: str, kv_cache: str, item: int) -> None:
    row = {"llama": 3 * 2 * 2 * 32, "sparse": 2 * 2 * 2 * 16}[variant] * item
    with bundles.engine(variant, "aipc", kv_cache=kv_cache).session() as session:
        assert session.cache_bytes() == 0
        session.forward(bundles.prompt[:100])
        assert session.cache_bytes() == 100 * row
        session.rewind(60)
        assert session.cache_bytes() == 40 * row


@pytest.mark.parametrize("kv_cache", ["fp32", "fp16", "int8"])
def test_a_clone_has_a_state_of_its_own(bundles: Bundles, kv_cache: str) -> None:
    with bundles.engine("llama", "aipc", kv_cache=kv_cache).session() as session:
        session.forward(bundles.prompt[:40])
        before = session.forward(bundles.prompt[40:41])
        session.rewind(1)
        with session.fork() as twin:
            np.testing.assert_allclose(twin.forward(bundles.prompt[40:41]), before, atol=TOLERANCE)
            twin.rewind(41)
            twin.forward(prompt(60, seed=8))
        np.testing.assert_allclose(session.forward(bundles.prompt[40:41]), before, atol=TOLERANCE)


def test_an_empty_session_forks_too(bundles: Bundles) -> None:
    with bundles.engine("llama", "aipc").session() as session, session.fork() as twin:
        got = twin.forward(bundles.prompt[:10])
        np.testing.assert_allclose(got, bundles.reference("llama").logits[9], atol=2e-3)


def test_sessions_of_one_engine_do_not_meet(bundles: Bundles) -> None:
    engine = bundles.engine("sparse", "aipc")
    with engine.session() as first, engine.session() as second:
        for start in range(0, 120, 30):
            first.forward(bundles.prompt[start : start + 30])
            second.forward(bundles.prompt[::-1][start : start + 30])
        got = first.forward(bundles.prompt[120:121])
        np.testing.assert_allclose(got, bundles.reference("sparse").logits[120], atol=2e-3)


def test_a_last_row_is_not_a_view_of_the_next_one(bundles: Bundles) -> None:
    with bundles.engine("llama", "aipc").session() as session:
        first = session.forward(bundles.prompt[:10])
        kept = first.copy()
        session.forward(bundles.prompt[10:20])
        np.testing.assert_array_equal(first, kept)


def test_closing(bundles: Bundles) -> None:
    session = bundles.engine("llama", "aipc").session()
    session.forward(bundles.prompt[:10])
    session.close()
    session.close()
    assert session.closed
    with pytest.raises(BackendError, match="this session is closed"):
        session.forward([1])


def test_the_keys_of_a_layer(bundles: Bundles) -> None:
    with bundles.engine("llama", "aipc").session() as session:
        assert isinstance(session, OpenVinoSession)
        session.forward(bundles.prompt[:30])
        keys = session.layer_keys(2).copy()
        assert keys.shape == (2, 30, 32)
        session.rewind(10)
        np.testing.assert_allclose(session.layer_keys(2), keys[:, :20], atol=TOLERANCE)


def test_facts_for_reports(bundles: Bundles) -> None:
    engine = open_engine(bundles.open("llama", "aipc"), threads=1, max_context=100)
    facts = engine.info()
    assert facts["engine"] == "openvino" and facts["version"][0].isdigit()
    assert (facts["device"], facts["threads"], facts["max_context"]) == ("CPU", 1, 100)
    engine.close()


@pytest.mark.parametrize("device", ["NPU", "cuda", "CPU.7"])
def test_devices_that_the_engine_does_not_serve(bundles: Bundles, device: str) -> None:
    bundle = bundles.open("llama", "aipc")
    with pytest.raises(BackendError, match="device: expected CPU or GPU for an aipc bundle, got") as caught:
        open_engine(bundle, device=device)
    assert (caught.value.hint is not None and "LLMPipeline" in caught.value.hint) == (device == "NPU")


def test_a_gpu_that_is_not_there(bundles: Bundles, monkeypatch: pytest.MonkeyPatch) -> None:
    import openvino

    class WithoutGpu:
        available_devices = ("CPU",)

    monkeypatch.setattr(openvino, "Core", WithoutGpu)
    with pytest.raises(BackendError, match="device GPU: OpenVINO finds CPU on this machine") as caught:
        open_engine(bundles.open("llama", "aipc"), device="gpu")
    assert caught.value.hint is not None and "Intel GPU driver" in caught.value.hint


def test_a_missing_openvino(bundles: Bundles, monkeypatch: pytest.MonkeyPatch) -> None:
    bundle = bundles.open("llama", "aipc")
    without_module(monkeypatch, "openvino")
    with pytest.raises(BackendError, match="'openvino' is needed here and is not installed") as caught:
        open_engine(bundle)
    assert caught.value.hint == 'pip install "cpm-edge[aipc]"'


def test_an_old_openvino(bundles: Bundles) -> None:
    bundle = bundles.open("llama", "aipc")
    needs_more = dataclasses.replace(bundle.manifest, engine=bundle.manifest.engine | {"requires": ">=2099"})
    with pytest.raises(BackendError, match="openvino: expected version >=2099, got"):
        open_engine(dataclasses.replace(bundle, manifest=needs_more))


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("openvino_model.xml", b""),
        ("openvino_model.xml", b"<net><layers>"),
        ("openvino_model.bin", b""),
        ("openvino_model.bin", b"\0" * 100),
    ],
)
def test_a_damaged_model(bundles: Bundles, tmp_path: Path, name: str, content: bytes) -> None:
    bundle = with_damaged(bundles.open("llama", "aipc"), tmp_path / "bad", name, content)
    with pytest.raises(BackendError, match=r"OpenVINO cannot compile openvino_model\.xml"):
        open_engine(bundle)


def test_a_model_of_another_exporter(bundles: Bundles, tmp_path: Path) -> None:
    import openvino
    import openvino.opset15 as ops

    x: Any = ops.parameter([1], openvino.Type.f32, name="x")
    openvino.serialize(openvino.Model([ops.relu(x)], [x], "other"), tmp_path / "other.xml")
    content = (tmp_path / "other.xml").read_bytes()
    bundle = with_damaged(bundles.open("llama", "aipc"), tmp_path / "bad", "openvino_model.xml", content)
    with pytest.raises(BackendError, match="expected one node logits_rows, found 0"):
        open_engine(bundle)
