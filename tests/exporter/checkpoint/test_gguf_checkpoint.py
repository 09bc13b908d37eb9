from __future__ import annotations

from pathlib import Path
from typing import Any

import gguf
import ml_dtypes
import numpy as np
import pytest
from gguf import GGMLQuantizationType as Type
from hypothesis import given
from hypothesis import strategies as st

from cpm_edge.exporter.checkpoint import open_checkpoint
from cpm_edge.exporter.checkpoint.gguf_names import hf_names, stored_rows
from cpm_edge.exporter.errors import CheckpointError
from cpm_edge.quant import QuantError
from tests.exporter.checkpoint.builders import VOCAB, model_weights, permute, write_gguf
from tests.support import gguf_file
from tests.support.bundles import Bundles
from tests.support.checkpoints import config_of, gguf_of, gguf_sources, tensors_of
from tests.support.gguf_file import GGUFS

Q_PROJ = "model.layers.0.self_attn.q_proj.weight"
K_PROJ = "model.layers.0.self_attn.k_proj.weight"
DOWN = "model.layers.0.mlp.down_proj.weight"


@pytest.mark.parametrize("architecture", ["llama", "minicpm"])
def test_weights_come_back_under_hf_names_in_hf_row_order(tmp_path: Path, architecture: str) -> None:
    weights = model_weights()
    path = write_gguf(tmp_path / "tiny.gguf", weights, architecture=architecture)
    with open_checkpoint(str(path)) as checkpoint:
        assert (checkpoint.name, checkpoint.kind) == ("tiny", "gguf")
        assert {name: info.shape for name, info in checkpoint.tensors.items()} == {
            name: weight.shape for name, weight in weights.items()
        }
        for name, weight in weights.items():
            np.testing.assert_array_equal(checkpoint.read(name), weight)
            np.testing.assert_array_equal(checkpoint.read_raw(name), weight)


@pytest.mark.parametrize("kind", [Type.F16, Type.BF16, Type.Q8_0, Type.Q4_0, Type.Q4_1, Type.Q5_0, Type.Q5_1])
def test_row_blocks_are_slices_of_the_dequantized_whole(tmp_path: Path, kind: Type) -> None:
    weights = model_weights()
    types = dict.fromkeys((Q_PROJ, K_PROJ, DOWN), kind)
    path = write_gguf(tmp_path / "tiny.gguf", weights, types=types)
    with open_checkpoint(str(path)) as checkpoint:
        for name in types:
            # Rows are quantized one by one, so the order of the rows does not matter here.
            packed = gguf.quants.quantize(weights[name], kind)
            expected = gguf.quants.dequantize(packed, kind)
            assert checkpoint.tensors[name].dtype == kind.name
            for start, stop in ((0, None), (0, 1), (3, 5), (7, 9), (5, 5), (1, expected.shape[0])):
                rows = checkpoint.read(name, start, stop)
                assert rows.dtype == np.float32 and rows.flags.c_contiguous
                np.testing.assert_array_equal(rows, expected[start:stop])


def test_raw_rows_keep_the_storage_type(tmp_path: Path) -> None:
    weights = model_weights()
    types = {Q_PROJ: Type.F16, K_PROJ: Type.BF16, DOWN: Type.Q4_0}
    path = write_gguf(tmp_path / "tiny.gguf", weights, types=types)
    with open_checkpoint(str(path)) as checkpoint:
        raw = checkpoint.read_raw(Q_PROJ, 2, 9)
        assert raw.dtype == np.float16
        np.testing.assert_array_equal(raw, weights[Q_PROJ][2:9].astype(np.float16))
        assert checkpoint.read_raw(K_PROJ).dtype == ml_dtypes.bfloat16
        with pytest.raises(CheckpointError, match="stored as Q4_0 blocks"):
            checkpoint.read_raw(DOWN)


@given(heads=st.integers(1, 5), half=st.integers(1, 6), data=st.data())
def test_stored_rows_undo_the_converters_permutation(heads: int, half: int, data: st.DataObject) -> None:
    rows = heads * 2 * half
    weight = np.arange(rows, dtype=np.float32).reshape(rows, 1)
    start = data.draw(st.integers(0, rows))
    stop = data.draw(st.integers(start, rows))
    order = stored_rows(np.arange(start, stop), 2 * half)
    np.testing.assert_array_equal(permute(weight, heads)[order], weight[start:stop])


def test_query_and_key_biases_are_put_in_order_too(tmp_path: Path) -> None:
    weights = model_weights()
    bias = np.arange(32, dtype=np.float32)
    stored = permute(bias.reshape(-1, 1), 4).reshape(-1)
    path = write_gguf(tmp_path / "tiny.gguf", weights, extra={"blk.0.attn_q.bias": stored})
    with open_checkpoint(str(path)) as checkpoint:
        name = Q_PROJ.replace("weight", "bias")
        np.testing.assert_array_equal(checkpoint.read(name), bias)
        np.testing.assert_array_equal(checkpoint.read(name, 3, 11), bias[3:11])
        assert checkpoint.config["attention_bias"] is True
        assert checkpoint.config["mlp_bias"] is False


class TestConfig:
    def config(self, tmp_path: Path, **options: Any) -> dict[str, Any]:
        weights = options.pop("weights", model_weights())
        with open_checkpoint(str(write_gguf(tmp_path / "tiny.gguf", weights, **options))) as checkpoint:
            return checkpoint.config

    def test_llama(self, tmp_path: Path) -> None:
        weights = model_weights() | {"lm_head.weight": np.ones((VOCAB, 32), dtype=np.float32)}
        metadata = {
            "llama.attention.key_length": 8,
            "llama.rope.freq_base": 5e6,
            "tokenizer.ggml.bos_token_id": 1,
            "tokenizer.ggml.eos_token_id": 2,
        }
        assert self.config(tmp_path, weights=weights, metadata=metadata) == {
            "architectures": ["LlamaForCausalLM"],
            "model_type": "llama",
            "vocab_size": VOCAB,
            "hidden_size": 32,
            "intermediate_size": 64,
            "num_hidden_layers": 1,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "head_dim": 8,
            "hidden_act": "silu",
            "rms_norm_eps": 1e-5,
            "rope_theta": 5e6,
            "rope_scaling": None,
            "max_position_embeddings": 128,
            "tie_word_embeddings": False,
            "attention_bias": False,
            "mlp_bias": False,
            "bos_token_id": 1,
            "eos_token_id": 2,
        }

    def test_defaults(self, tmp_path: Path) -> None:
        metadata = {"llama.attention.head_count_kv": None, "llama.rope.dimension_count": None}
        weights = model_weights()
        weights[K_PROJ] = weights[Q_PROJ]
        config = self.config(tmp_path, weights=weights, metadata=metadata)
        assert config["num_key_value_heads"] == 4
        assert config["head_dim"] == 8
        assert config["rope_theta"] == 10000.0
        assert config["tie_word_embeddings"] is True

    def test_minicpm_scales(self, tmp_path: Path) -> None:
        metadata = {
            "minicpm.block_count": 32,
            "minicpm.embedding_scale": 12.0,
            "minicpm.residual_scale": 1.4 / 32**0.5,
            "minicpm.logit_scale": 16.0,
        }
        config = self.config(tmp_path, architecture="minicpm", metadata=metadata)
        assert config["architectures"] == ["MiniCPMForCausalLM"]
        assert (config["scale_emb"], config["scale_depth"], config["dim_model_base"]) == (12, 1.4, 2)

    def test_minicpm_files_without_scales_mean_those_of_minicpm_2b(self, tmp_path: Path) -> None:
        config = self.config(tmp_path, architecture="minicpm")
        assert (config["scale_emb"], config["scale_depth"], config["dim_model_base"]) == (12, 1.4, 256)

    @pytest.mark.parametrize("scaled", [True, False])
    def test_minicpm3(self, tmp_path: Path, scaled: bool) -> None:
        """llama.cpp's converter writes neither the scales nor theta nor the size of the value heads."""
        variant = "minicpm3-gguf-q8_0"
        config = config_of(variant)
        settings = {key: value for key, value in config.items() if scaled or key != "scale_emb"}
        path = gguf_file.write(tmp_path / "tiny.gguf", settings, gguf_sources(variant), gguf_of(variant))
        with open_checkpoint(str(path)) as checkpoint:
            found = checkpoint.config
        rope = config["rope_scaling"]
        expected = config | {"rope_scaling": {**rope, "rope_type": "longrope"}, "rope_theta": 10000.0}
        del expected["rope_scaling"]["type"]
        if not scaled:
            expected |= {"scale_emb": 12, "scale_depth": 1.4, "dim_model_base": 256}
        assert {key: found[key] for key in expected} == expected

    @pytest.mark.parametrize(
        ("changes", "message"),
        [
            (
                {"num_attention_heads": 5},
                "kv_b_proj.weight: expected rows for 5 heads of more than 16 .*, got 192",
            ),
            ({"qk_nope_head_dim": 64}, "expected rows for 4 heads of more than 64 .*, got 192"),
        ],
    )
    def test_minicpm3_heads_that_do_not_fit(
        self, tmp_path: Path, changes: dict[str, int], message: str
    ) -> None:
        variant = "minicpm3-gguf-q8_0"
        settings = config_of(variant) | changes
        path = gguf_file.write(tmp_path / "tiny.gguf", settings, gguf_sources(variant), gguf_of(variant))
        with pytest.raises(CheckpointError, match=message):
            open_checkpoint(str(path))

    def test_longrope_comes_from_its_tensors(self, tmp_path: Path) -> None:
        long, short = np.array([1.1, 2.2, 3.3, 4.4], np.float32), np.array([1, 1, 1.5, 2], np.float32)
        extra = {"rope_factors_long.weight": long, "rope_factors_short.weight": short}
        expected = {
            "rope_type": "longrope",
            "long_factor": [1.1, 2.2, 3.3, 4.4],
            "short_factor": [1.0, 1.0, 1.5, 2.0],
            "original_max_position_embeddings": 128,
        }
        assert self.config(tmp_path, architecture="minicpm", extra=extra)["rope_scaling"] == expected
        metadata = {
            "minicpm.rope.scaling.type": "longrope",
            "minicpm.rope.scaling.original_context_length": 64,
        }
        config = self.config(tmp_path, architecture="minicpm", extra=extra, metadata=metadata)
        assert config["rope_scaling"] == expected | {"original_max_position_embeddings": 64}

    def test_llama_3_factors_become_equal_lists(self, tmp_path: Path) -> None:
        scaling = self.config(tmp_path, extra={"rope_freqs.weight": np.array([1, 1, 4, 8], np.float32)})[
            "rope_scaling"
        ]
        assert scaling["long_factor"] == scaling["short_factor"] == [1.0, 1.0, 4.0, 8.0]
        assert scaling["original_max_position_embeddings"] == 128
        assert (
            self.config(tmp_path, extra={"rope_freqs.weight": np.ones(4, np.float32)})["rope_scaling"] is None
        )

    def test_linear_scaling(self, tmp_path: Path) -> None:
        metadata: dict[str, Any] = {"llama.rope.scaling.type": "linear", "llama.rope.scaling.factor": 4.0}
        scaling = self.config(tmp_path, metadata=metadata)["rope_scaling"]
        assert scaling == {"rope_type": "linear", "factor": 4.0}


@pytest.mark.parametrize(
    ("metadata", "message"),
    [
        ({"llama.rope.scaling.type": "yarn"}, "expected none, linear or longrope, got yarn"),
        ({"llama.rope.scaling.type": "longrope"}, "does not fit the rope_factors"),
        ({"llama.block_count": None}, "llama.block_count: expected a number, got None"),
        ({"llama.attention.head_count": [4, 4]}, r"expected a number, got \[4, 4\]"),
        ({"llama.expert_count": 8}, "with experts is not supported"),
        ({"split.count": 3}, "one part of several"),
        ({"llama.rope.dimension_count": 4}, "attn_q.weight: expected 4 heads of 4 rows, got 32"),
        ({"llama.attention.head_count": 5}, "expected 5 heads of 8 rows, got 32"),
        ({"llama.attention.key_length": 16}, "expected key_length, value_length and rope.dimension_count"),
        ({"llama.block_count": 1.5}, "expected an integer"),
    ],
)
def test_metadata_that_cannot_be_used_is_named(
    tmp_path: Path, metadata: dict[str, Any], message: str
) -> None:
    path = write_gguf(tmp_path / "tiny.gguf", model_weights(), metadata=metadata)
    with pytest.raises(CheckpointError, match=message) as caught:
        open_checkpoint(str(path))
    assert str(path) in caught.value.message


def test_other_architectures_are_refused_with_the_supported_ones(tmp_path: Path) -> None:
    path = write_gguf(tmp_path / "tiny.gguf", model_weights(), architecture="qwen2")
    with pytest.raises(
        CheckpointError, match="architecture 'qwen2' is not supported, expected llama, minicpm, minicpm3"
    ):
        open_checkpoint(str(path))


def test_unknown_tensors_are_refused() -> None:
    for name in ("blk.0.ffn_gate_exps.weight", "blk.0.attn_sinks.weight", "v.patch_embd.weight"):
        with pytest.raises(CheckpointError, match=name):
            hf_names(["token_embd.weight", name], "llama")
    for name, architecture in (("blk.0.attn_q.weight", "minicpm3"), ("blk.0.attn_q_a.weight", "llama")):
        with pytest.raises(CheckpointError, match=f"{name} is not part of a dense {architecture} model"):
            hf_names([name], architecture)


def test_types_without_dequantizer_are_named(tmp_path: Path) -> None:
    weights = model_weights()
    codes = np.zeros((64, 32), dtype=np.int8)
    del weights["model.layers.0.mlp.up_proj.weight"]
    path = write_gguf(tmp_path / "tiny.gguf", weights, extra={"blk.0.ffn_up.weight": codes})
    with pytest.raises(CheckpointError, match=r"blk\.0\.ffn_up\.weight is of type I8"):
        open_checkpoint(str(path))


def test_fingerprint_is_of_the_one_file(tmp_path: Path) -> None:
    path = write_gguf(tmp_path / "tiny.gguf", model_weights())
    with open_checkpoint(str(path)) as checkpoint:
        found = checkpoint.fingerprint()
    assert found["kind"] == "gguf"
    assert found["files"]["tiny.gguf"]["bytes"] == path.stat().st_size


@pytest.mark.parametrize("variant", GGUFS)
def test_every_type_reads_as_the_weights_it_stands_for(bundles: Bundles, variant: str) -> None:
    expected = tensors_of(variant)
    with open_checkpoint(str(bundles.checkpoint(variant))) as checkpoint:
        assert set(checkpoint.tensors) == set(expected)
        for name, weight in expected.items():
            np.testing.assert_array_equal(checkpoint.read(name), weight)
            integers = checkpoint.integers(name)
            blocks = gguf_of(variant).get(name)
            assert (integers is None) == (blocks is None or blocks.integers is None)
            if integers is not None:
                np.testing.assert_array_equal(
                    integers.block(24, min(72, len(weight)))().dequantize(), weight[24:72]
                )


def test_a_damaged_block_is_named(tmp_path: Path) -> None:
    weights = model_weights()
    for kind in (Type.Q4_1, Type.Q8_0):
        path = write_gguf(tmp_path / f"{kind.name}.gguf", weights, types={DOWN: kind})
        with open_checkpoint(str(path)) as checkpoint:
            stored = gguf.quants.quantize(weights[DOWN], kind)
        content = path.read_bytes()
        place = content.index(stored[:8].tobytes()) + 7 * stored.shape[1]
        path.write_bytes(content[:place] + np.float16(np.inf).tobytes() + content[place + 2 :])
        with open_checkpoint(str(path)) as checkpoint:
            if kind is Type.Q4_1:
                with pytest.raises(CheckpointError, match=f"tensor {DOWN}: row 7 holds NaN or infinity"):
                    checkpoint.integers(DOWN)
                continue
            integers = checkpoint.integers(DOWN)
            assert integers is not None
            with pytest.raises(QuantError, match="row 7 holds NaN or infinity"):
                integers.block(0, 32)()
