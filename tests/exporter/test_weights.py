from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from cpm_edge.exporter import weights as module
from cpm_edge.exporter.checkpoint import open_checkpoint
from cpm_edge.exporter.errors import CheckpointError
from cpm_edge.exporter.weights import ModelWeights
from cpm_edge.quant import Policy, Scheme, TensorClass, WeightFormat, quantize
from tests.support.checkpoints import (
    VARIANTS,
    Tensors,
    config_of,
    linear_names,
    make_tensors,
    tensors_of,
    write_checkpoint,
)

CONFIG = VARIANTS["llama"]
QUERY = "model.layers.1.self_attn.q_proj.weight"
NORM = "model.norm.weight"


def open_weights(folder: Path, tensors: Tensors, format_: str = "int4", **options: Any) -> ModelWeights:
    checkpoint = open_checkpoint(str(write_checkpoint(folder, CONFIG, tensors)))
    shapes = {name: tensor.shape for name, tensor in make_tensors(CONFIG).items()}
    constants = {"rotary.inv_freq": np.ones(16, np.float32)}
    policy = Policy.for_format(WeightFormat(format_), **options)
    return ModelWeights(checkpoint, shapes | {"rotary.inv_freq": (16,)}, constants, policy)


@pytest.fixture
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Blocks of 7 rows, which must become 6: an even number."""
    monkeypatch.setattr(module, "BLOCK_ELEMENTS", 7 * 64)


def test_row_blocks_are_panels_and_whole(tmp_path: Path, small_blocks: None) -> None:
    tensors = make_tensors(CONFIG)
    weights = open_weights(tmp_path, tensors)
    blocks = list(weights.blocks(QUERY))
    assert {len(block) for block in blocks[:-1]} == {8} and len(blocks) == 16
    np.testing.assert_array_equal(np.concatenate(blocks), tensors[QUERY])
    np.testing.assert_array_equal(np.concatenate(list(weights.blocks(NORM))), tensors[NORM])
    np.testing.assert_array_equal(np.concatenate(list(weights.blocks("rotary.inv_freq"))), np.ones(16))
    weights.checkpoint.close()


@pytest.mark.parametrize("symmetric", [True, False])
def test_blocks_quantize_like_the_whole(tmp_path: Path, small_blocks: None, symmetric: bool) -> None:
    tensors = make_tensors(CONFIG)
    weights = open_weights(tmp_path, tensors, group_size=32, symmetric=symmetric)
    whole = quantize(tensors[QUERY], weights.scheme(QUERY))
    parts = list(weights.quantized(QUERY))
    np.testing.assert_array_equal(np.concatenate([p.codes for p in parts]), whole.codes)
    np.testing.assert_array_equal(np.concatenate([p.scales for p in parts]), whole.scales)
    np.testing.assert_array_equal(weights.dequantized(QUERY), whole.dequantize())
    weights.checkpoint.close()


def test_float_formats_round_once(tmp_path: Path, small_blocks: None) -> None:
    tensors = make_tensors(CONFIG)
    for format_, bits in (("fp32", 24), ("fp16", 11), ("bf16", 8)):
        weights = open_weights(tmp_path, tensors, format_)
        relative = np.abs(weights.dequantized(QUERY) / tensors[QUERY] - 1)
        assert relative.max() <= (0 if format_ == "fp32" else 2.0**-bits)
        # Norms stay as they are whatever the format.
        np.testing.assert_array_equal(weights.dequantized(NORM), tensors[NORM])
        weights.checkpoint.close()


def test_classes_and_order(tmp_path: Path) -> None:
    weights = open_weights(tmp_path, make_tensors(CONFIG))
    kinds = {name: weights.kind(name) for name in weights.names()}
    assert kinds["model.embed_tokens.weight"] is TensorClass.EMBEDDING
    assert kinds["lm_head.weight"] is TensorClass.HEAD
    assert kinds[QUERY] is TensorClass.LINEAR and kinds[NORM] is TensorClass.NORM
    assert weights.names() == [*weights.checkpoint.tensors, "rotary.inv_freq"]
    assert weights.elements(QUERY) == 128 * 64 and weights.unused() == []
    weights.checkpoint.close()


def test_a_group_that_does_not_fit_shrinks_and_says_so(tmp_path: Path) -> None:
    weights = open_weights(tmp_path, make_tensors(CONFIG), group_size=64)
    down = "model.layers.0.mlp.down_proj.weight"
    assert weights.scheme(QUERY).group_size == 64 and weights.scheme(down).group_size == 32
    assert weights.notes == {down: "96 columns: group 64 -> 32"}
    weights.checkpoint.close()


def ternary_weights(folder: Path, tensors: Tensors) -> ModelWeights:
    checkpoint = open_checkpoint(str(write_checkpoint(folder, config_of("ternary"), tensors)))
    shapes = {name: tensor.shape for name, tensor in tensors.items()}
    return ModelWeights(checkpoint, shapes, {}, Policy.for_format(WeightFormat.TERNARY))


def test_ternary_groups_are_the_largest_that_fit_every_block(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "BLOCK_ELEMENTS", 8 * 256)
    tensors = tensors_of("ternary-row")
    key, up = (f"model.layers.1.{name}.weight" for name in ("self_attn.k_proj", "mlp.up_proj"))
    # One row of one block has smaller groups than all others.
    tensors[key][77, 64:128] *= 2
    # One block alone has a scale that float16 does not hold.
    tensors[up][300] = np.sign(tensors[up][300]) / np.float32(3)
    weights = ternary_weights(tmp_path, tensors)
    seen: list[int] = []
    weights.find_schemes(seen.append)
    assert sum(seen) == sum(tensor.size for tensor in tensors.values())
    row = Scheme(WeightFormat.TERNARY)
    assert weights.found[key] == replace(row, group_size=64)
    assert weights.found[up] == replace(row, wide_scales=True)
    assert len(weights.found) == 14 and set(weights.found.values()) == {
        row,
        weights.found[key],
        weights.found[up],
    }
    assert weights.linear_scheme() == (
        row,
        {key: "ternary g64", up: "ternary row with float32 scales"},
    )
    for name in (key, up):
        np.testing.assert_array_equal(weights.dequantized(name), tensors[name])
    weights.checkpoint.close()


def test_ternary_in_bfloat16_pytorch_files(tmp_path: Path) -> None:
    """As BitCPM-CANN is published."""
    import torch

    tensors = tensors_of("ternary")
    folder = write_checkpoint(tmp_path, config_of("ternary"), tensors)
    (folder / "model.safetensors").unlink()
    state = {name: torch.from_numpy(tensor).bfloat16() for name, tensor in tensors.items()}
    torch.save(state, folder / "pytorch_model.bin")
    shapes = {name: tensor.shape for name, tensor in tensors.items()}
    with open_checkpoint(str(folder)) as checkpoint:
        assert checkpoint.tensors[linear_names(tensors)[0]].dtype == "BF16"
        weights = ModelWeights(checkpoint, shapes, {}, Policy.for_format(WeightFormat.TERNARY))
        for name in linear_names(tensors):
            assert weights.scheme(name) == Scheme(WeightFormat.TERNARY, 128)
            np.testing.assert_array_equal(weights.dequantized(name), tensors[name])


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize(("format_", "method"), [("int4", "quantized"), ("fp16", "stored")])
def test_a_number_that_is_none_is_named(
    tmp_path: Path, small_blocks: None, bad: float, format_: str, method: str
) -> None:
    tensors = make_tensors(CONFIG)
    tensors[QUERY][50, 3] = bad
    weights = open_weights(tmp_path, tensors, format_)
    with pytest.raises(CheckpointError, match=rf"tensor {QUERY}: row 50 holds NaN"):
        list(getattr(weights, method)(QUERY))
    weights.checkpoint.close()


def test_a_value_beyond_float16_is_named(tmp_path: Path) -> None:
    tensors = make_tensors(CONFIG)
    tensors[QUERY][0, 0] = 1e6
    weights = open_weights(tmp_path, tensors, "fp16")
    with pytest.raises(CheckpointError, match=f"tensor {QUERY}"):
        list(weights.stored(QUERY))
    weights.checkpoint.close()


def test_names_and_shapes_are_checked_before_any_work(tmp_path: Path) -> None:
    tensors = make_tensors(CONFIG)
    weights = open_weights(tmp_path / "good", tensors | {"extra.weight": np.zeros((2, 2), np.float32)})
    weights.check()
    assert weights.unused() == ["extra.weight"]
    weights.checkpoint.close()

    weights = open_weights(tmp_path / "missing", {n: t for n, t in tensors.items() if n != QUERY})
    with pytest.raises(CheckpointError, match=rf"tensor {QUERY}: expected shape \[128, 64\], not in the"):
        weights.check()
    weights.checkpoint.close()

    weights = open_weights(tmp_path / "shape", tensors | {QUERY: tensors[QUERY].T.copy()})
    with pytest.raises(CheckpointError, match=rf"{QUERY}: expected shape \[128, 64\] .*, got \[64, 128\]"):
        weights.check()
    weights.checkpoint.close()
