from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from cpm_edge.exporter.configs import MiniCPM3Config
from cpm_edge.exporter.errors import ConfigError
from cpm_edge.exporter.model_card import cache_cost
from cpm_edge.exporter.targets.common import cache_layers
from tests.support.checkpoints import VARIANTS

RELEASED = Path(__file__).parents[2] / "data/configs/minicpm3-4b.json"


def read(**changes: Any) -> MiniCPM3Config:
    return MiniCPM3Config.from_dict(VARIANTS["minicpm3"] | changes)


def released(**changes: Any) -> MiniCPM3Config:
    return MiniCPM3Config.from_dict(json.loads(RELEASED.read_text()) | changes)


def test_the_released_config() -> None:
    config = released()
    spec = config.attention_spec(61)
    assert (spec.num_heads, spec.kv_num_heads, spec.v_head_size, spec.topk) == (40, 1, 256, 0)
    assert spec.scale == 96**-0.5
    assert (config.q_lora_rank, config.kv_lora_rank, config.v_head_dim) == (768, 256, 64)
    assert config.layer_caches(0) == {"key": (1, "capacity", 288)}
    assert config.scale_emb == 12 and config.logit_divisor == 10
    assert config.residual_scale == pytest.approx(0.17780018, rel=1e-7)
    assert config.tie_word_embeddings and config.max_context == 32768


def test_a_token_takes_one_row_a_layer() -> None:
    """What peers cache, keys of 96 and values of 64 for 40 heads, is 22 times as much."""
    layout = cache_layers(released(), "float16")
    assert layout["token_bytes"] == 62 * 288 * 2 == 35_712
    assert layout["expanded_token_bytes"] == 62 * 40 * (96 + 64) * 2 == 793_600
    assert cache_layers(released(), "float32")["token_bytes"] == 2 * 35_712
    assert (
        cache_cost(layout) == "35.7 kB a token (float16); keys and values of every head would take 793.6 kB"
    )


def test_longrope_is_made_for_the_rotated_columns() -> None:
    rope = released().rope
    table = rope.table(32768)
    assert table.inv_freq.shape == (16,) and table.scaling == 1
    assert table.inv_freq[0] == pytest.approx(1 / 1.0591234137867171)
    assert table.inv_freq[15] == pytest.approx(1e4 ** (-30 / 32) / 16.940876586213285)
    assert table.note == "LongRoPE, short list for 32768 tokens"
    # The tiny checkpoint was trained for 256 tokens and stretched to 1024.
    assert read().rope.table(1024).scaling == pytest.approx((1 + 2 / 8) ** 0.5)


def test_the_value_heads_follow_the_hidden_size_unless_told_otherwise() -> None:
    assert read().v_head_dim == 32
    assert read(v_head_dim=None).v_head_dim == 16


def test_what_transformers_adds_is_accepted() -> None:
    assert read(head_dim=8, qk_head_dim=18, num_experts=0, sparse_config=None) == read()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"q_lora_rank": None}, "q_lora_rank: expected an integer, got nothing"),
        ({"kv_lora_rank": 0}, "kv_lora_rank: expected a positive integer, got 0"),
        ({"qk_nope_head_dim": "10"}, "qk_nope_head_dim: expected an integer, got '10'"),
        ({"qk_rope_head_dim": 7}, "qk_rope_head_dim: expected an even number, got 7"),
        ({"v_head_dim": -1}, "v_head_dim: expected a positive integer, got -1"),
        ({"num_key_value_heads": 2}, "num_key_value_heads: expected 4, got 2"),
        ({"head_dim": 18}, "head_dim: expected 8, got 18"),
        ({"qk_head_dim": 20}, "qk_head_dim: expected 18, got 20"),
        (
            {"hidden_size": 66, "v_head_dim": None},
            "num_attention_heads: expected a divisor of hidden_size 66, got 4",
        ),
        ({"scale_emb": None}, "scale_emb: expected a number, got nothing"),
        ({"scale_depth": None}, "scale_depth: expected a number, got nothing"),
        ({"dim_model_base": None}, "dim_model_base: expected an integer, got nothing"),
        ({"attention_bias": True}, "attention_bias: expected false, got true"),
        ({"mlp_bias": True}, "mlp_bias: expected false, got true"),
        ({"hidden_act": "gelu"}, "hidden_act: expected silu, got gelu"),
        ({"num_experts": 8}, "num_experts: expected 0, got 8"),
        ({"sparse_config": {"topk": 64}}, "sparse_config: expected nothing, got {'topk': 64}"),
        ({"rope_scaling": {"type": "yarn", "factor": 4}}, "rope_scaling.rope_type: expected .*, got yarn"),
        (
            {"rope_scaling": {"type": "longrope", "long_factor": [1.0], "short_factor": [1.0]}},
            "rope_scaling.long_factor: expected 4",
        ),
        (
            {"rope_scaling": {"type": "linear", "factor": 4, "mscale_all_dim": 1}},
            "rope_scaling: unknown keys mscale_all_dim",
        ),
    ],
)
def test_what_the_architecture_refuses(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        read(**changes)


def test_unknown_keys_are_told() -> None:
    with pytest.warns(UserWarning, match="keys without effect here: o_lora_rank"):
        read(o_lora_rank=1024)
