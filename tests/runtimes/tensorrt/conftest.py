from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from cpm_edge.runtimes.bundle import Bundle, ContextLimits, open_bundle
from cpm_edge.runtimes.tensorrt import api, device
from tests.runtimes.fakes import make_bundle
from tests.runtimes.tensorrt.fake_cuda import FakeCuda
from tests.runtimes.tensorrt.fake_tensorrt import FakeTensorRt
from tests.runtimes.tensorrt.tiny_model import CHUNK, VOCAB, TinyModel


@dataclass
class Board:
    """A machine with a fake GPU.

    Attributes:
        root: its /proc and /etc.
    """

    cuda: FakeCuda
    tensorrt: FakeTensorRt
    root: Path

    def has_memory(self, nbytes: int) -> None:
        """What /proc/meminfo says is available."""
        (self.root / "proc/meminfo").write_text(f"MemTotal: 9999999 kB\nMemAvailable:   {nbytes >> 10} kB\n")


@pytest.fixture
def board(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Board:
    """An Orin with TensorRT 10.3 in place of the machine the tests run on."""
    root = tmp_path / "root"
    for folder in ("proc/device-tree", "etc"):
        (root / folder).mkdir(parents=True)
    (root / "proc/device-tree/model").write_text("NVIDIA Jetson Orin Nano Developer Kit\0")
    (root / "etc/nv_tegra_release").write_text(
        "# R36 (release), REVISION: 4.3, GCID: 38968081, BOARD: generic\n"
    )
    cuda = FakeCuda()
    made = Board(cuda, FakeTensorRt(cuda), root)
    made.has_memory(6 << 30)
    put_in_place(monkeypatch, cuda, tensorrt=made.tensorrt)
    monkeypatch.setattr(device, "_ROOT", root)
    monkeypatch.setattr(device.detect_device, "__defaults__", (root,))
    return made


def put_in_place(monkeypatch: pytest.MonkeyPatch, cuda: Any, **modules: Any) -> None:
    """Let imports find these instead of what is installed."""
    bindings = ModuleType("cuda.bindings")
    bindings.runtime = cuda  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "cuda.bindings", bindings)
    monkeypatch.setitem(sys.modules, "cuda.bindings.runtime", cuda)
    monkeypatch.setattr(api, "_apis", {})
    for name, module in modules.items():
        monkeypatch.setitem(sys.modules, name, module)


MakeBundle = Callable[..., Bundle]


@pytest.fixture
def tiny_bundle(tmp_path: Path) -> MakeBundle:
    """Makes a bundle of a TinyModel; ``extra``: more files, other keywords: changes of ``engine``."""

    def make(
        tiny: TinyModel,
        where: str = "bundle",
        /,
        plugins: bool = False,
        extra: dict[str, bytes] | None = None,
        library: bytes = b"\x7fELF and so on",
        **engine: Any,
    ) -> Bundle:
        folder = tmp_path / where
        folder.mkdir()
        tiny.save(folder)
        for file, data in (extra or {}).items():
            (folder / file).write_bytes(data)
        if plugins:
            (folder / "plugins").mkdir()
            (folder / "plugins/libcpm_tensorrt.so").write_bytes(library)
        return open_bundle(make_bundle(folder, model=False, **manifest_of(tiny, plugins, engine)))

    return make


def manifest_of(tiny: TinyModel, plugins: bool, engine: dict[str, Any]) -> dict[str, Any]:
    """Fields of the manifest as the exporter writes them."""
    embedding = {"file": "embedding.bin", "format": "float16", "rows": VOCAB, "columns": tiny.hidden}
    library = {"library": "plugins/libcpm_tensorrt.so", "version": "1", "names": ["CpmSparseAttention"]}
    recurrent = {"layers": [1], "heads": 1, "key_size": 16, "value_size": 16}
    return {
        "target": "jetson",
        "chip": "orin-nano-8gb",
        "flavour": "native" if tiny.form == "in_place" else "stock",
        "vocab_size": VOCAB,
        "hidden_size": tiny.hidden,
        "num_layers": 1 + tiny.recurrent,
        "context": ContextLimits(max_context=tiny.capacity),
        "cache": {
            "form": tiny.form,
            "capacity": tiny.capacity,
            "dtype": "float16",
            "layers": 1 + tiny.recurrent,
            "kv_heads": 2,
            "head_dim": 16,
            **({"recurrent": recurrent} if tiny.recurrent else {}),
        },
        "attention": {"num_heads": 4, "topk": 0},
        "engine": {
            "name": "tensorrt",
            "version": "10.3",
            "requires": ">=10.3",
            "sm": 87 if plugins else None,
            "prefill_chunk": CHUNK,
            "plugins": library if plugins else None,
            "embedding": {**embedding, "offset": 0, "scales": None} if tiny.host_embedding else None,
            "memory": {"weights": 100_000, "kv_cache": 20_000, "workspace": 10_000},
            **engine,
        },
    }
