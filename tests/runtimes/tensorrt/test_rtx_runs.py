"""Bundles for TensorRT-RTX on a fake card."""

from __future__ import annotations

from pathlib import Path

import pytest

from cpm_edge.runtimes import open_engine
from cpm_edge.runtimes.errors import BackendError
from cpm_edge.runtimes.tensorrt.engine import TensorRtEngine
from tests.runtimes.tensorrt.conftest import Board, MakeBundle, put_in_place
from tests.runtimes.tensorrt.fake_cuda import FakeCuda
from tests.runtimes.tensorrt.fake_tensorrt import ComputeCapability, FakeTensorRtRtx
from tests.runtimes.tensorrt.test_engine_cache import run_once
from tests.runtimes.tensorrt.tiny_model import TinyModel

RTX = {"name": "tensorrt_rtx", "requires": ">=1.7"}


@pytest.fixture
def card(board: Board, monkeypatch: pytest.MonkeyPatch) -> Board:
    """A PC with an RTX card of compute capability 8.9."""
    cuda = FakeCuda(sm=89, integrated=False)
    module = FakeTensorRtRtx(cuda)
    put_in_place(monkeypatch, cuda, tensorrt_rtx=module)
    return Board(cuda, module, board.root)


def test_it_builds_for_the_card_and_keeps_compiled_kernels(card: Board, tiny_bundle: MakeBundle) -> None:
    tiny = TinyModel(recurrent=True)
    bundle = tiny_bundle(tiny, **RTX)
    run_once(bundle, tiny)
    assert card.tensorrt.last_config is not None
    assert card.tensorrt.last_config.capabilities == {0: ComputeCapability.SM89}
    run_once(bundle, tiny)
    assert isinstance(card.tensorrt, FakeTensorRtRtx)
    assert [kernels.taken for kernels in card.tensorrt.kernel_caches] == [None, b"kernel;"]
    assert card.tensorrt.builds == 1
    assert card.cuda.live == 0


def test_kernels_of_an_engine_in_the_bundle_stay_out_of_the_bundle(
    card: Board, tiny_bundle: MakeBundle, tmp_path: Path
) -> None:
    tiny = TinyModel()
    engine = open_engine(tiny_bundle(tiny, **RTX))
    assert isinstance(engine, TensorRtEngine)
    engine.close()
    plan = next((tmp_path / "user-cache").rglob("engine.plan")).read_bytes()
    facts = {"file": "model.engine", "version": "1.7.1.116", "sm": [86, 89]}
    bundle = tiny_bundle(tiny, "ahead", extra={"model.engine": plan}, **RTX, plan=facts)
    run_once(bundle, tiny)
    run_once(bundle, tiny)
    assert list(bundle.path.rglob("kernels*")) == []
    assert isinstance(card.tensorrt, FakeTensorRtRtx)
    assert card.tensorrt.kernel_caches[-1].taken == b"kernel;"
    assert card.tensorrt.builds == 1


def test_plugins_and_unknown_chips_are_refused(card: Board, tiny_bundle: MakeBundle) -> None:
    plugins = tiny_bundle(TinyModel("in_place"), "plugins", plugins=True, **RTX, sm=None)
    with pytest.raises(BackendError, match="tensorrt_rtx has no plugins") as caught:
        open_engine(plugins)
    assert caught.value.hint == "Export with: --target rtx"
    card.cuda.facts |= {"major": 7, "minor": 0}
    with pytest.raises(BackendError, match=r"expected a compute capability of \[86, 89\], got 70"):
        open_engine(tiny_bundle(TinyModel(), **RTX))
