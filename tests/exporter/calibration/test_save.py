"""Saved checkpoints read by our own reader, bit by bit."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from cpm_edge.exporter.calibration.save import save_checkpoint
from cpm_edge.exporter.checkpoint import open_checkpoint
from cpm_edge.exporter.errors import ExportError
from cpm_edge.exporter.export import prepare
from cpm_edge.exporter.progress import Progress
from cpm_edge.runtimes.errors import BundleError
from tests.exporter.calibration.conftest import Bench

CASES: list[tuple[str, dict[str, Any]]] = [
    ("llama", {"method": "gptq"}),
    ("llama", {"method": "gptq", "group_size": 64}),  # and 32 where 64 does not divide the columns
    ("llama", {"method": "gptq", "symmetric": False}),
    ("llama", {"method": "gptq", "ratio": 0.6}),
    ("llama", {"method": "awq"}),
    ("moe", {"method": "gptq+awq"}),
    ("minicpm3", {"method": "gptq+awq"}),
    ("sala", {"method": "awq"}),
]


def save(bench: Bench, folder: Path, variant: str, **changes: Any) -> Path:
    save_checkpoint(bench.outcome(variant, **changes).result, folder, Progress(enabled=False))
    return folder


@pytest.mark.parametrize(("variant", "changes"), CASES)
def test_every_tensor_comes_back(bench: Bench, tmp_path: Path, variant: str, changes: dict[str, Any]) -> None:
    expected = bench.outcome(variant, **changes).result.checkpoint
    with open_checkpoint(str(save(bench, tmp_path / "saved", variant, **changes))) as saved:
        assert set(saved.tensors) == set(expected.tensors)
        assert set(saved.packed) == set(expected.packed)
        assert set(saved.packed.values()) == {"AWQ" if changes["method"] == "awq" else "GPTQ"}
        for name, info in expected.tensors.items():
            if name not in expected.packed:
                np.testing.assert_array_equal(saved.read(name), expected.read(name), name)
                continue
            back, made = saved.integers(name), expected.integers(name)
            assert back is not None
            assert made is not None
            assert back.column_order is None
            assert back.scheme == made.scheme
            one, other = (integers.block(0, info.shape[0])() for integers in (back, made))
            np.testing.assert_array_equal(one.codes, other.codes)
            np.testing.assert_array_equal(one.scales, other.scales)
            np.testing.assert_array_equal(one.zero_points(), other.zero_points())
        # And an export takes it without another word.
        options = bench.options(variant, method="rtn", weight_format="auto", group_size=None)
        assert prepare(options, saved).taken is not None


def test_what_config_json_says(bench: Bench, tmp_path: Path) -> None:
    folder = save(bench, tmp_path / "saved", "llama", method="gptq", group_size=64)
    config = json.loads((folder / "config.json").read_text())
    quantization = config["quantization_config"]
    assert quantization | {"dynamic": None} == {
        "quant_method": "gptq",
        "bits": 4,
        "group_size": 64,
        "sym": True,
        "desc_act": False,
        "static_groups": True,
        "checkpoint_format": "gptq",
        "damp_percent": 0.01,
        "true_sequential": False,
        "lm_head": False,
        "dynamic": None,
    }
    assert quantization["dynamic"][r"+:^model\.layers\.2\.mlp\.down_proj$"] == {"group_size": 32}
    assert config["architectures"] == ["LlamaForCausalLM"]
    assert {"tokenizer.json", "tokenizer_config.json", "generation_config.json"} <= {
        p.name for p in folder.iterdir()
    }
    about = json.loads((folder / "calibration.json").read_text())
    assert about["dataset"] == "default"


def test_shards(bench: Bench, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("cpm_edge.exporter.calibration.save.SHARD_BYTES", 60_000)
    folder = save(bench, tmp_path / "saved", "llama", method="gptq")
    assert len(list(folder.glob("model-*.safetensors"))) > 1
    with open_checkpoint(str(folder)) as saved:
        assert len(saved.packed) == 21


def test_awq_has_one_group_size(bench: Bench, tmp_path: Path) -> None:
    with pytest.raises(ExportError, match=r"AWQ has one group size .* has 32 instead of 64"):
        save(bench, tmp_path / "saved", "llama", method="awq", group_size=64)
    assert not (tmp_path / "saved").exists()


def test_the_folder_must_not_exist(bench: Bench, tmp_path: Path) -> None:
    (tmp_path / "saved").mkdir()
    (tmp_path / "saved" / "file").touch()
    with pytest.raises(BundleError, match="exists already"):
        save(bench, tmp_path / "saved", "llama", method="gptq")
