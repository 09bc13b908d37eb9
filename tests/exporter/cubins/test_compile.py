"""Cubins for sm_87 from the installed ptxas: their index, determinism, and what is refused."""

from __future__ import annotations

import hashlib
import json
from dataclasses import replace
from pathlib import Path

import pytest

from cpm_edge.exporter.cubins import toolchain
from cpm_edge.exporter.cubins.compile import compile_cubins, shipped_configurations
from cpm_edge.exporter.cubins.occupancy import LIMITS
from cpm_edge.exporter.errors import ExportError
from cpm_edge.plugins.linear_attention.launches import chunked
from cpm_edge.plugins.matmul_nbits.launches import SMALL, Tile, product
from cpm_edge.plugins.sparse_attention.launches import plan
from cpm_edge.plugins.sparse_attention.spec import SparseAttentionSpec

ELF_CUDA = 190  # e_machine of a cubin


def fake_ptxas(folder: Path, version: str) -> Path:
    path = folder / "ptxas"
    path.write_text(f"#!/bin/sh\necho 'Cuda compilation tools, release 1, V{version}'\n")
    path.chmod(0o755)
    return path


def test_the_index_describes_the_files_and_two_runs_are_equal(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    configs = [product(4, 128, tile=SMALL), product(2, 32, tile=SMALL)]
    folders = [tmp_path / "a", tmp_path / "b"]
    for folder, fusion in zip(folders, "10", strict=True):
        folder.mkdir()
        monkeypatch.setenv("TRITON_DEFAULT_FP_FUSION", fusion)  # a user's settings change nothing
        monkeypatch.setenv("TRITON_INTERPRET", fusion)
        compile_cubins(folder, configs=configs)
    first, second = ((folder / "index.json").read_bytes() for folder in folders)
    assert first == second
    index = json.loads(first)
    assert (index["sm"], index["ptxas"], index["ptx"]) == (87, "12.6.85", "8.5")
    assert [each["name"] for each in index["kernels"]] == [each.name for each in configs]
    for each in index["kernels"]:
        data = (folders[1] / each["file"]).read_bytes()
        assert hashlib.sha256(data).hexdigest() == each["sha256"] and len(data) == each["bytes"]
        assert data[:4] == b"\x7fELF" and int.from_bytes(data[18:20], "little") == ELF_CUDA
        assert each["entry"].encode() in data
        assert b"cpm_edge" not in data and b".py" not in data  # no path of this machine
        assert each["stack_bytes"] == each["scratch_bytes"] == 0
        assert 0 < each["registers"] <= 255 and each["threads"] == 128


def test_a_sparse_decode_step_of_the_8b_models_does_not_spill(tmp_path: Path) -> None:
    launches = plan(SparseAttentionSpec(32, 2, 128**-0.5), 128, 32768).variant(1).launches
    index = compile_cubins(tmp_path, configs=[each.kernel for each in launches])
    assert len(index.cubins) == 6
    # Two programs a multiprocessor at least, of the 163 KiB that it has.
    assert max(each.shared_bytes for each in index.cubins) < 80 << 10


def test_a_kernel_that_spills_is_refused(tmp_path: Path) -> None:
    wide = product(2, 128, tile=Tile(128, 64, None, warps=4, stages=3))
    with pytest.raises(ExportError, match=r"expected no spilled registers, got \d+ bytes"):
        compile_cubins(tmp_path, configs=[wide])
    assert not (tmp_path / "index.json").exists()


def test_a_failure_of_the_compiler_is_one_line(tmp_path: Path) -> None:
    wrong = replace(product(4, 32), function="missing")
    with pytest.raises(ExportError, match="Triton compiler failed: AttributeError") as caught:
        compile_cubins(tmp_path, configs=[wrong])
    assert "\n" not in caught.value.message


def test_a_newer_ptxas_is_refused(tmp_path: Path) -> None:
    path = fake_ptxas(tmp_path, "12.9.86")
    with pytest.raises(
        ExportError, match=r"CUDA 12\.6 or older for sm_87 \(JetPack 6\.2\), got 12\.9\.86"
    ) as caught:
        compile_cubins(tmp_path, ptxas=path)
    assert caught.value.hint == "pip install nvidia-cuda-nvcc-cu12==12.6.85"
    assert toolchain.find_toolchain(87, fake_ptxas(tmp_path, "12.4.131")).version == "12.4.131"


def test_no_ptxas_and_no_such_chip(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ExportError, match=r"expected one of sm_87, sm_110, .*, got sm_75"):
        compile_cubins(tmp_path, 75)
    with pytest.raises(ExportError, match="did not run"):
        compile_cubins(tmp_path, ptxas=tmp_path / "none")
    monkeypatch.setattr(toolchain, "find_spec", lambda name: None)
    with pytest.raises(ExportError, match=r"ptxas of CUDA 12\.6 is not installed"):
        compile_cubins(tmp_path)


def test_thor_has_an_assembler_of_its_own(tmp_path: Path) -> None:
    index = compile_cubins(tmp_path, 110, [product(8, 0), chunked(64, 64)]).to_json()
    assert (index["sm"], index["jetpack"], index["ptxas"], index["ptx"]) == (
        110,
        "JetPack 7.2",
        "13.0.88",
        "9.0",
    )
    assert all(each["stack_bytes"] == 0 for each in index["kernels"])


def test_cards_are_no_jetsons() -> None:
    jetsons = [sm for sm, platform in toolchain.PLATFORMS.items() if platform.jetpack]
    assert jetsons == [87, 110]
    assert sorted(toolchain.PLATFORMS) == sorted(LIMITS)


def test_shipped_names_are_sorted() -> None:
    names = [each.name for each in shipped_configurations()]
    assert names == sorted(set(names))
