"""Packed checkpoints read as their matrices."""

from __future__ import annotations

from dataclasses import astuple
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from cpm_edge.exporter.checkpoint import open_checkpoint
from cpm_edge.exporter.checkpoint.quantization import Quantization, read_quantization
from cpm_edge.exporter.errors import CheckpointError, ConfigError
from tests.exporter.checkpoint.builders import write_json
from tests.support.bundles import Bundles
from tests.support.checkpoints import config_of, packed_of, stored_of, tensors_of, write_checkpoint
from tests.support.packed import PACKINGS, Packing, pack, quantized

DOWN = "model.layers.1.mlp.down_proj.weight"


@pytest.mark.parametrize("variant", PACKINGS)
def test_rows_are_the_dequantized_matrices(bundles: Bundles, variant: str) -> None:
    expected = tensors_of(variant)
    with open_checkpoint(str(bundles.checkpoint(variant))) as checkpoint:
        assert {name: info.shape for name, info in checkpoint.tensors.items()} == {
            name: tensor.shape for name, tensor in expected.items()
        }
        assert set(checkpoint.packed) == set(packed_of(variant))
        for name in ("model.embed_tokens.weight", "model.norm.weight", DOWN):
            np.testing.assert_array_equal(checkpoint.read(name), expected[name])
        for start, stop in ((0, 1), (3, 77), (64, 128), (255, 256), (9, 9)):
            rows = checkpoint.read(DOWN, start, stop)
            assert rows.dtype == np.float32 and rows.flags.c_contiguous
            np.testing.assert_array_equal(rows, expected[DOWN][start:stop])
        with pytest.raises(CheckpointError, match=f"{DOWN} is stored as packed"):
            checkpoint.read_raw(DOWN)


COMBINATIONS = [
    Packing(format_, group, symmetric, act_order)
    for format_, group, symmetric, act_order in product(
        ("gptq", "gptq_v2", "awq"), (32, 128, -1), (True, False), (False, True)
    )
    if not act_order or (format_ != "awq" and group != -1)
]


@pytest.mark.parametrize("packing", COMBINATIONS, ids=lambda p: "-".join(map(str, astuple(p)[:4])))
def test_integers_are_those_that_were_packed(tmp_path: Path, packing: Packing) -> None:
    """Both zero point conventions, with and without act order, bit by bit; larger groups are split."""
    rng = np.random.default_rng(0)
    matrix = quantized(rng.standard_normal((64, 256)).astype(np.float32), packing, 0)
    config = config_of("gptq") | {"quantization_config": packing.config()}
    module = "model.layers.0.mlp.up_proj"
    folder = write_checkpoint(tmp_path, config, pack(module, matrix, packing))
    with open_checkpoint(str(folder)) as checkpoint:
        integers = checkpoint.integers(f"{module}.weight")
        assert integers is not None
        block = integers.block(0, 64)()
    expected, width = matrix.sorted(), min(packing.group, 128) if packing.group > 0 else 128
    repeat = 256 // width // expected.scales.shape[1]
    assert integers.scheme.describe() == f"int4 g{width} {'sym' if packing.symmetric else 'asym'}"
    np.testing.assert_array_equal(block.codes, expected.codes)
    np.testing.assert_array_equal(block.scales, np.repeat(expected.scales, repeat, 1))
    np.testing.assert_array_equal(block.zero_points(), np.repeat(expected.zeros, repeat, 1))
    order = np.argsort(matrix.g_idx, kind="stable")
    if packing.act_order:
        assert integers.column_order is not None
        np.testing.assert_array_equal(integers.column_order, order)
    else:
        assert integers.column_order is None


def test_pytorch_files(tmp_path: Path) -> None:
    import torch

    folder = write_checkpoint(tmp_path, config_of("gptq"), {})
    (folder / "model.safetensors").unlink()
    state = {name: torch.from_numpy(tensor) for name, tensor in stored_of("gptq").items()}
    torch.save(state, folder / "pytorch_model.bin")
    with open_checkpoint(str(folder)) as checkpoint:
        np.testing.assert_array_equal(checkpoint.read(DOWN), tensors_of("gptq")[DOWN])


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("quantize_config.json", {"bits": 4, "group_size": 128, "sym": True, "desc_act": False}),
        ("quantize_config.json", PACKINGS["gptq"].config()),
    ],
)
def test_an_older_file_beside_config_json(tmp_path: Path, name: str, content: dict[str, Any]) -> None:
    config = {key: value for key, value in config_of("gptq").items() if key != "quantization_config"}
    folder = write_checkpoint(tmp_path, config, stored_of("gptq"))
    with pytest.raises(CheckpointError, match=r"config\.json has no quantization_config"):
        open_checkpoint(str(folder))
    write_json(folder / name, content)
    with open_checkpoint(str(folder)) as checkpoint:
        assert "quantization_config" not in checkpoint.config
        np.testing.assert_array_equal(checkpoint.read(DOWN), tensors_of("gptq")[DOWN])


def read(section: dict[str, Any], folder: Path) -> Quantization | None:
    return read_quantization({"quantization_config": section}, folder)


def test_settings(tmp_path: Path) -> None:
    assert read_quantization({}, tmp_path) is None
    gptq = {"quant_method": "gptq", "bits": 4, "group_size": 32}
    assert read(gptq, tmp_path) == Quantization("gptq", True, frozenset({32}), True)
    assert read(gptq | {"format": "gptq_v2", "sym": False}, tmp_path) == Quantization(
        "gptq", False, frozenset({32}), False
    )
    dynamic = {"-:.*o_gate.*": {}, r"+:.*\.18\..*gate.*": {"group_size": 128, "sym": False}}
    assert read(gptq | {"dynamic": dynamic}, tmp_path) == Quantization(
        "gptq", True, frozenset({32, 128}), False
    )
    awq = {"quant_method": "awq", "bits": 4, "group_size": 64, "version": "GEMM", "zero_point": True}
    assert read(awq, tmp_path) == Quantization("awq", False, frozenset({64}), False)
    # As MiniCPM5-1B-AWQ-Sym-Marlin has it: named after the kernel, stored as GEMM.
    marlin = {"quant_method": "awq_marlin", "bits": 4, "group_size": 128, "version": "marlin"}
    assert read(marlin, tmp_path) == Quantization("awq", False, frozenset({128}), False)
    write_json(tmp_path / "quant_config.json", {"w_bit": 4, "q_group_size": 128, "version": "GEMM"})
    assert read_quantization({}, tmp_path) == Quantization("awq", False, frozenset({128}), False)


GPTQ = {"quant_method": "gptq", "bits": 4}


@pytest.mark.parametrize(
    ("section", "message"),
    [
        ({}, "quant_method: expected gptq or awq with 4 bits, got unknown"),
        ({"quant_method": "bitsandbytes", "load_in_4bit": True}, "quant_method: .*, got bitsandbytes"),
        ({"quant_method": "compressed-tensors"}, "quant_method: .*, got compressed-tensors"),
        ({"quant_method": "fp8"}, "quant_method: .*, got fp8"),
        ({"quant_method": "gptq"}, "bits: expected 4, got nothing"),
        (GPTQ | {"bits": 8}, "quantization_config.bits: expected 4, got 8"),
        (GPTQ | {"bits": 3}, "bits: expected 4, got 3"),
        (GPTQ | {"group_size": 16}, "group_size: expected -1 or a multiple of 32, got 16"),
        (GPTQ | {"group_size": 0}, "group_size: expected -1 or a multiple of 32, got 0"),
        (GPTQ | {"checkpoint_format": "bitblas"}, "checkpoint_format: expected gptq, .*, got bitblas"),
        (GPTQ | {"pack_dtype": "int64"}, "pack_dtype: expected int32, got int64"),
        (GPTQ | {"rotation": "hadamard"}, "rotation: expected nothing, got hadamard"),
        (GPTQ | {"mystery": 1}, "quantization_config: unknown keys mystery"),
        ({"quant_method": "awq", "bits": 4, "version": "gemv"}, "version: expected gemm or marlin, got gemv"),
    ],
)
def test_what_is_refused(tmp_path: Path, section: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message) as caught:
        read(section, tmp_path)
    assert "--weight-format int4" in (caught.value.hint or "")
