"""Finding, building and refusing engines on a fake board."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from cpm_edge.runtimes import build, open_engine
from cpm_edge.runtimes.bundle import Bundle
from cpm_edge.runtimes.errors import BackendError, BundleError
from cpm_edge.runtimes.tensorrt.build import input_weights
from cpm_edge.runtimes.tensorrt.cache import CachedEngine, EngineCache, identity_of
from cpm_edge.runtimes.tensorrt.engine import TensorRtEngine
from cpm_edge.runtimes.tensorrt.memory import BUILD_FACTOR
from tests.runtimes.tensorrt.conftest import Board, MakeBundle
from tests.runtimes.tensorrt.fake_tensorrt import (
    BuilderFlag,
    MemoryPoolType,
    NetworkDefinitionCreationFlag,
    PreviewFeature,
)
from tests.runtimes.tensorrt.test_session import assert_logits
from tests.runtimes.tensorrt.tiny_model import CHUNK, HIDDEN, TinyModel

CREATOR = ("CpmSparseAttention", "1", "cpm")


def cached(bundle: Bundle, version: str = "10.3.0", sm: int = 87) -> CachedEngine | None:
    return EngineCache().find(identity_of(bundle, version, sm))


def run_once(bundle: Bundle, tiny: TinyModel) -> TensorRtEngine:
    """Open, compute something right, close."""
    engine = open_engine(bundle)
    assert isinstance(engine, TensorRtEngine)
    with engine.session() as session:
        assert_logits(session.forward([3, 1, 4]), tiny.logits([3, 1, 4])[-1])
    engine.close()
    return engine


def test_an_engine_is_built_once_and_again_for_another_version(board: Board, tiny_bundle: MakeBundle) -> None:
    tiny = TinyModel()
    bundle = tiny_bundle(tiny)
    run_once(bundle, tiny)
    run_once(bundle, tiny)
    assert board.tensorrt.builds == 1
    board.tensorrt.__version__ = "10.16.1"
    run_once(bundle, tiny)
    assert board.tensorrt.builds == 2
    assert board.cuda.live == 0


def test_the_builder_gets_what_the_contract_says(board: Board, tiny_bundle: MakeBundle) -> None:
    bundle = tiny_bundle(TinyModel("in_place"), memory={"weights": 1, "kv_cache": 1, "workspace": 1200 << 20})
    build(bundle.path)
    config = board.tensorrt.last_config
    assert config is not None
    assert board.tensorrt.network_flags == 1 << NetworkDefinitionCreationFlag.STRONGLY_TYPED
    assert config.features == {PreviewFeature.ALIASED_PLUGIN_IO_10_03: True}
    assert config.pools == {MemoryPoolType.WORKSPACE: 1200 << 20}
    assert config.flags == set()
    rows = (1, 1, HIDDEN)
    prefill, decode = config.profiles
    assert prefill["inputs_embeds"] == (rows, (1, CHUNK, HIDDEN), (1, CHUNK, HIDDEN))
    assert prefill["logit_rows"] == ((1,), (1,), (CHUNK,))
    assert decode == {"inputs_embeds": (rows, rows, rows), "logit_rows": ((1,), (1,), (1,))}


def test_timings_are_kept_for_the_next_build(board: Board, tiny_bundle: MakeBundle) -> None:
    build(tiny_bundle(TinyModel(), "one").path)
    build(tiny_bundle(TinyModel(recurrent=True), "two").path)
    files = list(EngineCache().folder.glob("timings-*"))
    assert [file.name for file in files] == ["timings-tensorrt-10.3.0-sm87.cache"]
    assert files[0].read_bytes() == b"measured;measured;"


def test_build_reports_and_repairs(board: Board, tiny_bundle: MakeBundle) -> None:
    bundle = tiny_bundle(TinyModel())
    first = build(bundle.path)
    assert first.new and first.nbytes == first.path.stat().st_size and first.placement == "engine"
    assert not build(bundle.path).new
    data = first.path.read_bytes()
    first.path.write_bytes(b"x" + data[1:])  # same size
    with pytest.raises(
        BackendError, match=r"cannot load .*engine.plan\n  Error Code 1: Serialization"
    ) as caught:
        open_engine(bundle)
    assert caught.value.hint == "Build it anew: cpm-run BUNDLE --build-only"
    assert build(bundle.path).new
    assert first.path.read_bytes() == data


def test_half_an_engine_is_no_engine(board: Board, tiny_bundle: MakeBundle) -> None:
    tiny = TinyModel()
    bundle = tiny_bundle(tiny)
    path = build(bundle.path).path
    path.write_bytes(path.read_bytes()[:-5])
    run_once(bundle, tiny)
    path.with_name("engine.json").write_text("{")
    run_once(bundle, tiny)
    assert board.tensorrt.builds == 3


def test_an_engine_for_something_else_names_both_and_the_command(
    board: Board, tiny_bundle: MakeBundle
) -> None:
    bundle = tiny_bundle(TinyModel())
    path = build(bundle.path).path.with_name("engine.json")
    facts = json.loads(path.read_text())
    path.write_text(json.dumps(facts | {"version": "10.16.1", "sm": 110, "plugins": "2"}))
    with pytest.raises(BackendError) as caught:
        open_engine(bundle)
    assert "tensorrt version 10.16.1 there, 10.3.0 here" in caught.value.message
    assert "(SM) 110 there, 87 here" in caught.value.message
    assert "plugin version 2 there, None here" in caught.value.message
    assert caught.value.hint == "Build it for this machine: cpm-run BUNDLE --build-only"
    assert build(bundle.path).new


def test_an_engine_in_the_bundle_is_used_where_it_fits(board: Board, tiny_bundle: MakeBundle) -> None:
    tiny = TinyModel()
    plan = build(tiny_bundle(tiny).path).path.read_bytes()
    facts = {"file": "model.engine", "version": "10.3.0", "sm": [86, 87]}
    bundle = tiny_bundle(tiny, "with-engine", extra={"model.engine": plan}, plan=facts)
    run_once(bundle, tiny)
    assert board.tensorrt.builds == 1
    board.tensorrt.__version__ = "10.16.1"
    with pytest.raises(BackendError, match=r"model.engine was built for .* 10.3.0 there, 10.16.1 here"):
        open_engine(bundle)
    build(bundle.path)
    run_once(bundle, tiny)  # what was built here comes first


@pytest.mark.parametrize("form", ["rows_out", "in_place"])
def test_weights_become_inputs_when_the_build_does_not_fit(
    form: str, board: Board, tiny_bundle: MakeBundle, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("cpm_edge.runtimes.tensorrt.build._LEAST_INPUT", 1024)
    monkeypatch.setattr("cpm_edge.runtimes.tensorrt.memory.BUILD_FACTOR", 1e6)
    tiny = TinyModel(form)
    outside = sum(2 * tiny.weights[name].size for name in ("positions", "q", "k", "v", "o", "head"))
    memory = {"weights": outside, "kv_cache": 1, "workspace": 1}
    bundle = tiny_bundle(tiny, memory=memory)
    engine = run_once(bundle, tiny)
    found = cached(bundle)
    assert found is not None
    assert engine.info()["weights"] == "inputs"
    assert {weight.name for weight in found.weights} == {"positions", "q", "k", "v", "o", "head"}
    # Nothing but small constants is left in the plan.
    assert found.nbytes < bundle.file("model.onnx").stat().st_size + 4096
    run_once(bundle, tiny)
    assert board.tensorrt.builds == 1
    stays = tiny_bundle(tiny, "stays", memory=memory | {"weights": outside + 20_000})
    with pytest.raises(
        BackendError, match=r"GiB, with 0.\d MiB of 0.\d MiB weights kept out of it, 6.00 GiB"
    ):
        open_engine(stays)
    assert board.tensorrt.builds == 1


def test_weights_are_streamed_on_a_card_whose_memory_is_short(board: Board, tiny_bundle: MakeBundle) -> None:
    board.cuda.facts["integrated"] = 0
    board.cuda.total = 1 << 30
    board.has_memory(32 << 30)
    memory = {"weights": 2 << 30, "kv_cache": 1 << 20, "workspace": 1 << 20}
    tiny = TinyModel()
    engine = run_once(tiny_bundle(tiny, memory=memory), tiny)
    assert board.tensorrt.last_config is not None
    assert board.tensorrt.last_config.flags == {BuilderFlag.WEIGHT_STREAMING}
    assert engine.info()["weights"] == "streamed"
    assert engine.info()["cuda_graph"] is False


def test_too_little_memory_is_refused_before_the_build(board: Board, tiny_bundle: MakeBundle) -> None:
    memory = {"weights": 5 << 30, "kv_cache": 1 << 30, "workspace": 512 << 20}
    bundle = tiny_bundle(TinyModel(), memory=memory)
    with pytest.raises(BackendError) as caught:
        open_engine(bundle)
    expected = "5.00 GiB weights + 1.00 GiB KV cache + 512.0 MiB workspace + 300.0 MiB for CUDA = 6.79 GiB"
    assert expected in caught.value.message
    assert "6.00 GiB are free" in caught.value.message
    assert "Orin Nano" in caught.value.message
    assert board.tensorrt.builds == 0


def test_a_parser_error_names_the_node(board: Board, tiny_bundle: MakeBundle) -> None:
    text = "Plugin not found, are the plugin name, version, and namespace correct?"
    error = SimpleNamespace(
        node_name=lambda: "layers.3/attention", node_operator=lambda: "CpmSparseAttention", desc=lambda: text
    )
    board.tensorrt.parse_errors = [error, error]
    with pytest.raises(BundleError) as caught:
        open_engine(tiny_bundle(TinyModel()))
    assert caught.value.message.count(f"CpmSparseAttention 'layers.3/attention': {text}") == 1
    assert "Plugin not found" in str(caught.value.hint)
    assert board.cuda.live == 0


def test_a_build_error_has_the_last_lines_of_the_log(board: Board, tiny_bundle: MakeBundle) -> None:
    board.tensorrt.build_errors = [
        *(f"line {n}" for n in range(30)),
        "[allocator] Error Code 1: Cuda Runtime (out of memory)",
    ]
    with pytest.raises(
        BackendError, match=r"cannot build .*\n  line 19\n(.*\n)+  line 29\n  .*out of memory\)$"
    ) as caught:
        open_engine(tiny_bundle(TinyModel()))
    assert "line 5\n" not in caught.value.message
    assert "swap" in str(caught.value.hint)


def test_ctrl_c_stops_the_builder_and_not_the_process(
    board: Board, tiny_bundle: MakeBundle, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    from cpm_edge.runtimes.tensorrt.progress import BuildProgress

    monkeypatch.setattr(BuildProgress, "advance", interrupted)
    board.tensorrt.interrupt_build = True
    bundle = tiny_bundle(TinyModel())
    with pytest.raises(KeyboardInterrupt):
        open_engine(bundle)
    assert cached(bundle) is None


def test_a_folder_that_cannot_be_written_is_known_before_the_build(
    board: Board, tiny_bundle: MakeBundle, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    bundle = tiny_bundle(TinyModel())
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("CPM_EDGE_CACHE", str(tmp_path / "file"))
    with pytest.raises(BackendError, match="cannot be kept in") as caught:
        open_engine(bundle)
    assert "CPM_EDGE_CACHE" in str(caught.value.hint)
    assert board.tensorrt.builds == 0


def test_other_chips_devices_and_versions_are_refused(board: Board, tiny_bundle: MakeBundle) -> None:
    bundle = tiny_bundle(TinyModel("in_place"), sm=110)
    with pytest.raises(
        BackendError, match=r"SM 110 \(orin-nano-8gb\), this device is NVIDIA Jetson Orin Nano"
    ):
        open_engine(bundle)
    with pytest.raises(BackendError, match="device: expected cuda for a jetson bundle, got CPU"):
        open_engine(bundle, "CPU")
    with pytest.raises(BackendError, match="threads"):
        open_engine(bundle, threads=4)
    board.tensorrt.__version__ = "8.5.2"
    with pytest.raises(BackendError, match=r"the engine tensorrt: expected version >=10.3, got 8.5.2"):
        open_engine(bundle)


def test_a_capacity_other_than_the_manifests_is_refused(board: Board, tiny_bundle: MakeBundle) -> None:
    bundle = tiny_bundle(TinyModel())
    manifest = bundle.manifest
    other = dataclasses.replace(manifest, cache=manifest.cache | {"capacity": 128})
    with pytest.raises(BackendError, match="caches of 128 rows, got 64"):
        open_engine(Bundle(bundle.path, other))
    assert board.cuda.live == 0


def test_plugins_are_loaded_before_the_build_and_taken_out_at_the_end(
    board: Board, tiny_bundle: MakeBundle
) -> None:
    board.tensorrt.creators = [CREATOR]
    tiny = TinyModel("in_place")
    bundle = tiny_bundle(tiny, plugins=True)
    first, second = open_engine(bundle), open_engine(bundle)
    assert board.tensorrt.libraries == [str(bundle.path / "plugins/libcpm_tensorrt.so")]
    other = tiny_bundle(tiny, "other", plugins=True)
    with pytest.raises(BackendError, match="runs a bundle with plugins already"):
        open_engine(other)
    first.close()
    assert board.tensorrt.libraries
    second.close()
    assert board.tensorrt.libraries == []
    open_engine(other).close()


def test_missing_creators_and_foreign_libraries_are_refused(board: Board, tiny_bundle: MakeBundle) -> None:
    bundle = tiny_bundle(TinyModel("in_place"), plugins=True)
    board.tensorrt.creators = [("CpmSparseAttention", "2", "cpm"), ("Other", "1", "")]
    with pytest.raises(BackendError, match=r"Attention version 1 .* found cpm::\w+Attention version 2$"):
        open_engine(bundle)
    assert board.tensorrt.libraries == []
    foreign = tiny_bundle(TinyModel("in_place"), "foreign", plugins=True, library=b"MZ")
    with pytest.raises(BackendError, match=r"libcpm_tensorrt.so does not load in tensorrt 10.3.0") as caught:
        open_engine(foreign)
    assert "ldd" in str(caught.value.hint)


def test_input_weights_are_those_all_of_whose_uses_allow_it(tmp_path: Path) -> None:
    tiny = TinyModel(hidden=2048, capacity=512)
    tiny.save(tmp_path)
    chosen = input_weights((tmp_path / "model.onnx").read_bytes())
    assert [weight.name for weight in chosen] == ["positions"]  # 512 x 2048; all others are below 1 MiB
    data = np.fromfile(
        tmp_path / "model.onnx.data", np.float16, chosen[0].nbytes // 2, offset=chosen[0].offset
    )
    np.testing.assert_array_equal(data, tiny.weights["positions"].astype(np.float16).reshape(-1))


def test_the_build_factor_decides(board: Board) -> None:
    from cpm_edge.runtimes.cuda_runtime import load_cuda
    from cpm_edge.runtimes.tensorrt.device import detect_device
    from cpm_edge.runtimes.tensorrt.memory import Need, Placement, choose_placement

    need = Need(1 << 30, 0, 0)
    build_bytes = int(BUILD_FACTOR * need.weights)
    for available, placement in (
        (build_bytes + 4096, Placement.ENGINE),
        (build_bytes - 4096, Placement.INPUTS),
    ):
        board.has_memory(available)
        assert choose_placement(need, detect_device(load_cuda(), board.root)) is placement
    # Nothing is gained by streaming into the same memory.
    board.has_memory((1 << 30) + 1000)
    with pytest.raises(BackendError, match="not enough free memory on"):
        choose_placement(need, detect_device(load_cuda(), board.root))
