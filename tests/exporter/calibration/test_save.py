"""Saved checkpoints read by our own reader, bit by bit."""

from __future__ import annotations

import json
import re
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from cpm_edge.exporter.calibration.layout import choose_layout
from cpm_edge.exporter.calibration.save import save_checkpoint
from cpm_edge.exporter.checkpoint import open_checkpoint
from cpm_edge.exporter.errors import ExportError, ExportWarning
from cpm_edge.exporter.export import prepare
from cpm_edge.exporter.progress import Progress
from cpm_edge.exporter.weights import ModelWeights
from cpm_edge.quant import Scheme, WeightFormat
from cpm_edge.runtimes.errors import BundleError
from tests.exporter.calibration.conftest import Bench

CASES: list[tuple[str, dict[str, Any]]] = [
    ("llama", {"method": "gptq"}),
    ("llama", {"method": "gptq", "group_size": 64}),  # and 32 where 64 does not divide the columns
    ("llama", {"method": "gptq", "symmetric": False}),
    ("llama", {"method": "gptq", "ratio": 0.6}),
    ("llama", {"method": "gptq", "ratio": 0.3}),  # most weights are floats
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


@pytest.mark.parametrize("method", ["gptq", "awq"])
def test_an_export_keeps_mixed_precision(bench: Bench, tmp_path: Path, method: str) -> None:
    outcome = bench.outcome("llama", method=method, ratio=0.3)
    with open_checkpoint(str(save(bench, tmp_path / "saved", "llama", method=method, ratio=0.3))) as saved:
        first, again = (
            prepare(bench.options("llama", method="rtn", weight_format="auto", group_size=None), checkpoint)
            for checkpoint in (outcome.result.checkpoint, saved)
        )
        shapes = {name: tuple(i.shape) for name, i in saved.tensors.items() if ".layers." in name}
        one, other = (ModelWeights(p.checkpoint, shapes, {}, p.policy, p.taken) for p in (first, again))
        assert {one.scheme(name).format for name in outcome.result.record["int8"]} == {WeightFormat.INT8}
        for name in shapes:
            assert other.scheme(name) == one.scheme(name)
            np.testing.assert_array_equal(other.dequantized(name), one.dequantized(name), name)


def modules_of(folder: Path) -> tuple[set[str], set[str]]:
    """The modules of the layers that are integers, and those that are floats, by their tensors."""
    index = json.loads((folder / "model.safetensors.index.json").read_text())["weight_map"]
    integers = {name.removesuffix(".qweight") for name in index if name.endswith(".qweight")}
    floats = {
        name.removesuffix(".weight") for name in index if name.endswith((".gate.weight", "_proj.weight"))
    }
    return integers, floats


@pytest.mark.parametrize(
    ("variant", "changes"),
    [
        ("llama", {"method": "gptq", "ratio": 0.6}),
        ("llama", {"method": "awq", "ratio": 0.3}),
        ("moe", {"method": "gptq+awq"}),  # whose routers are floats
        ("minicpm3", {"method": "gptq+awq"}),  # kv_b_proj is one
    ],
)
def test_every_reader_learns_which_modules_are_floats(
    bench: Bench, tmp_path: Path, variant: str, changes: dict[str, Any]
) -> None:
    folder = save(bench, tmp_path / "saved", variant, **changes)
    integers, floats = modules_of(folder)
    quantization = json.loads((folder / "config.json").read_text())["quantization_config"]
    # gptqmodel
    left_out = [key.removeprefix("-:") for key in quantization["dynamic"] if key.startswith("-:")]
    assert floats
    assert {m for m in integers | floats if any(re.match(key, m) for key in left_out)} == floats
    if changes["method"] == "awq":  # transformers, AutoAWQ and vLLM: parts of names
        left_out = quantization["modules_to_not_convert"]
        assert {m for m in integers | floats if any(part in m for part in left_out)} == floats
    else:  # optimum and vLLM: ends of names
        (taken,) = quantization["modules_in_block_to_quantize"]
        assert {m for m in integers | floats if m.endswith(tuple(taken))} == integers


def test_the_weights_are_as_readable_as_the_config(bench: Bench, tmp_path: Path) -> None:
    folder = save(bench, tmp_path / "saved", "llama", method="gptq")
    assert len({path.stat().st_mode for path in folder.iterdir()}) == 1


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


@pytest.mark.parametrize("ratio", [1.0, 0.9])
def test_awq_has_one_group_size(bench: Bench, tmp_path: Path, ratio: float) -> None:
    """Refused before the first layer."""
    changes = {"method": "awq", "group_size": 64, "ratio": ratio, "save_checkpoint": tmp_path / "saved"}
    with (
        warnings.catch_warnings(action="ignore", category=ExportWarning),
        pytest.raises(ExportError, match=r"AWQ has one group size .* has 32 instead of 64"),
    ):
        bench.calibrate(tmp_path / "work", "llama", **changes)
    assert not (tmp_path / "work").exists()


def test_a_matrix_whose_rows_cannot_be_packed() -> None:
    name = "model.layers.0.mlp.up_proj.weight"
    with pytest.raises(ExportError, match=f"gptq packs 8 rows, and {name} has 100"):
        choose_layout("gptq", {name: Scheme(WeightFormat.INT4, 32)}, {name: (100, 64)})


def test_the_folder_must_not_exist(bench: Bench, tmp_path: Path) -> None:
    (tmp_path / "saved").mkdir()
    (tmp_path / "saved" / "file").touch()
    result = bench.outcome("llama", method="gptq").result
    with pytest.raises(BundleError, match="exists already") as caught:
        save_checkpoint(result, tmp_path / "saved", Progress(enabled=False))
    assert caught.value.hint == "Choose another --save-checkpoint, or replace it with --overwrite."
    with pytest.raises(BundleError, match=r"not one that this option wrote \(it has no calibration.json"):
        save_checkpoint(result, tmp_path / "saved", Progress(enabled=False), overwrite=True)


def test_overwrite_replaces_a_saved_checkpoint(bench: Bench, tmp_path: Path) -> None:
    folder = save(bench, tmp_path / "saved", "llama", method="gptq")
    result = bench.outcome("llama", method="awq").result
    save_checkpoint(result, folder, Progress(enabled=False), overwrite=True)
    assert json.loads((folder / "calibration.json").read_text())["method"] == "awq"
