"""What is found out about a machine, and what its absence says."""

from __future__ import annotations

import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest

from cpm_edge.runtimes.cuda_runtime import Cuda, load_cuda
from cpm_edge.runtimes.errors import BackendError
from cpm_edge.runtimes.tensorrt.api import load_api
from cpm_edge.runtimes.tensorrt.device import available_memory, detect_device
from tests.runtimes.engine_checks import without_module
from tests.runtimes.tensorrt.conftest import Board, put_in_place
from tests.runtimes.tensorrt.fake_cuda import FakeCuda


def test_a_jetson_is_known_by_its_files(board: Board) -> None:
    device = detect_device(Cuda(board.cuda), board.root)
    assert (device.sm, device.unified, device.l4t, device.jetpack) == (87, True, "36.4.3", "6")
    assert device.available == device.host_available == 6 << 30  # of the system, not of CUDA
    expected = "NVIDIA Jetson Orin Nano Developer Kit, SM 87, L4T 36.4.3 (JetPack 6), 8.00 GiB shared memory"
    assert str(device) == expected


def test_a_card_has_two_memories(tmp_path: Path) -> None:
    (tmp_path / "proc").mkdir()
    (tmp_path / "proc/meminfo").write_text("MemAvailable:    2048 kB\n")
    device = detect_device(Cuda(FakeCuda(total=1 << 30, sm=120, integrated=False)), tmp_path)
    assert (device.name, device.sm, device.l4t, device.jetpack) == ("Fake GPU", 120, None, None)
    assert (device.available, device.host_available) == (1 << 30, 2 << 20)


def test_a_system_that_says_nothing_has_what_cuda_says(tmp_path: Path) -> None:
    assert available_memory(tmp_path) is None
    assert detect_device(Cuda(FakeCuda()), tmp_path).available == 8 << 30


def test_no_gpu_and_no_driver_are_one_error(monkeypatch: pytest.MonkeyPatch) -> None:
    put_in_place(monkeypatch, FakeCuda(count=0))
    with pytest.raises(BackendError, match=r"no NVIDIA GPU can be used .*NoDevice"):
        load_cuda()

    class NotFoundError(Exception):
        pass

    def raises() -> None:
        raise NotFoundError("libcuda.so.1")

    put_in_place(monkeypatch, SimpleNamespace(cudaGetDeviceCount=raises))
    with pytest.raises(BackendError, match=r"no NVIDIA GPU can be used .*libcuda.so.1"):
        load_cuda()


def test_missing_cuda_python_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    without_module(monkeypatch, "cuda")
    with pytest.raises(BackendError, match=r"'cuda.bindings' is needed") as caught:
        load_cuda()
    assert "cpm-edge[jetson]" in str(caught.value.hint)


@pytest.mark.parametrize(
    ("name", "hint"), [("tensorrt", "python3-libnvinfer"), ("tensorrt_rtx", "cpm-edge[rtx]")]
)
def test_missing_engines_and_stubs_alone_are_named(
    name: str, hint: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    put_in_place(monkeypatch, FakeCuda())
    monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(BackendError, match=f"'{name}' is needed here and cannot be imported") as caught:
        load_api(name)
    assert hint in str(caught.value.hint)
    stubs = ModuleType(name)
    stubs.__path__ = ["/site-packages/tensorrt"]
    monkeypatch.setitem(sys.modules, name, stubs)
    with pytest.raises(BackendError, match="only type information was found, in /site-packages/tensorrt"):
        load_api(name)


def test_other_engines_are_refused() -> None:
    with pytest.raises(BackendError, match="expected one of tensorrt, tensorrt_rtx, got 'os'"):
        load_api("os")


def test_the_real_bindings_have_every_function_that_is_called() -> None:
    runtime = pytest.importorskip("cuda.bindings.runtime")
    called = [name for name in vars(FakeCuda) if name.startswith("cuda")]
    assert [name for name in called if not hasattr(runtime, name)] == []
    for kind, names in {
        "cudaMemcpyKind": ["cudaMemcpyHostToDevice", "cudaMemcpyDeviceToHost", "cudaMemcpyDeviceToDevice"],
        "cudaStreamCaptureMode": ["cudaStreamCaptureModeThreadLocal"],
        "cudaDeviceAttr": list(vars(FakeCuda.cudaDeviceAttr)),
        "cudaError_t": ["cudaErrorMemoryAllocation", "cudaErrorNoDevice"],
    }.items():
        assert all(hasattr(getattr(runtime, kind), name) for name in names)
