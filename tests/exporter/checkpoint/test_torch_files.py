from __future__ import annotations

import os
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from cpm_edge.exporter.checkpoint import open_checkpoint
from cpm_edge.exporter.errors import CheckpointError
from tests.exporter.checkpoint.builders import CONFIG, write_json


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    write_json(tmp_path / "config.json", CONFIG)
    return tmp_path


def test_rows_equal_what_was_saved(folder: Path) -> None:
    base = torch.arange(40, dtype=torch.float32).reshape(10, 4)
    state = {
        "f32": base,
        "bf16": base.to(torch.bfloat16),
        "tied": base,
        "view": base[3:7],
        "parameter": torch.nn.Parameter(torch.ones(3, dtype=torch.float16)),
        "codes": torch.arange(6, dtype=torch.int32).reshape(3, 2),
    }
    torch.save(state, folder / "pytorch_model.bin")
    with open_checkpoint(str(folder)) as checkpoint:
        assert checkpoint.kind == "torch"
        assert checkpoint.tensors["codes"].dtype == "I32"
        np.testing.assert_array_equal(checkpoint.read("f32", 2, 5), base[2:5].numpy())
        np.testing.assert_array_equal(checkpoint.read("tied"), base.numpy())
        np.testing.assert_array_equal(checkpoint.read("view", 1), base[4:7].numpy())
        np.testing.assert_array_equal(checkpoint.read("parameter"), np.ones(3))
        raw = checkpoint.read_raw("bf16", 1, 3)
        assert raw.dtype == ml_dtypes.bfloat16
        np.testing.assert_array_equal(raw.view(np.uint16), state["bf16"][1:3].view(torch.uint16).numpy())
        np.testing.assert_array_equal(checkpoint.read_raw("codes"), state["codes"].numpy())


def test_sharded_files_follow_their_index(folder: Path) -> None:
    torch.save({"a": torch.ones(2, 2)}, folder / "pytorch_model-00001-of-00002.bin")
    torch.save({"b": torch.zeros(3)}, folder / "pytorch_model-00002-of-00002.bin")
    names = {"a": "pytorch_model-00001-of-00002.bin", "b": "pytorch_model-00002-of-00002.bin"}
    write_json(folder / "pytorch_model.bin.index.json", {"weight_map": names})
    with open_checkpoint(str(folder)) as checkpoint:
        np.testing.assert_array_equal(checkpoint.read("a"), np.ones((2, 2)))
        assert set(checkpoint.tensors) == {"a", "b"}
    write_json(folder / "pytorch_model.bin.index.json", {"weight_map": names | {"c": names["a"]}})
    with pytest.raises(CheckpointError, match="tensor c is in"):
        open_checkpoint(str(folder))


def test_safetensors_are_preferred(folder: Path) -> None:
    torch.save({"w": torch.ones(2)}, folder / "pytorch_model.bin")
    save_file({"w": torch.zeros(2)}, folder / "model.safetensors")
    with open_checkpoint(str(folder)) as checkpoint:
        assert checkpoint.kind == "safetensors"
        np.testing.assert_array_equal(checkpoint.read("w"), np.zeros(2))


class RunsCode:
    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return os.mkdir, (str(self.marker),)


def test_a_pickle_that_runs_code_is_refused_and_does_not_run(folder: Path) -> None:
    marker = folder / "ran"
    torch.save({"w": torch.ones(2), "evil": RunsCode(marker)}, folder / "pytorch_model.bin")
    with pytest.raises(CheckpointError, match="could run code") as caught:
        open_checkpoint(str(folder))
    assert "safetensors" in str(caught.value.hint)
    assert not marker.exists()


@pytest.mark.parametrize("keep", [0, 10, 300, -1])
def test_truncated_files_are_refused_at_open(folder: Path, keep: int) -> None:
    path = folder / "pytorch_model.bin"
    torch.save({"w": torch.ones(100, 10)}, path)
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(CheckpointError, match="not a whole file of PyTorch"):
        open_checkpoint(str(folder))


def test_the_format_before_1_6_is_refused(folder: Path) -> None:
    torch.save({"w": torch.ones(2)}, folder / "pytorch_model.bin", _use_new_zipfile_serialization=False)
    with pytest.raises(CheckpointError, match=r"PyTorch 1\.6 or later"):
        open_checkpoint(str(folder))


@pytest.mark.parametrize(
    ("state", "message"),
    [
        ([torch.ones(1)], "expected a dictionary of tensors"),
        ({"step": 3}, "expected a dictionary of tensors"),
        ({"w": torch.ones(3, 2).T}, "expected a row-major tensor"),
        ({"w": torch.ones(2, dtype=torch.complex64)}, "complex64 is not supported"),
    ],
    ids=["list", "number", "transposed", "complex"],
)
def test_other_contents_are_refused(folder: Path, state: object, message: str) -> None:
    torch.save(state, folder / "pytorch_model.bin")
    with pytest.raises(CheckpointError, match=message):
        open_checkpoint(str(folder))
