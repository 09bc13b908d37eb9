from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from cpm_edge.exporter.configs import MiniCPMSALAConfig
from cpm_edge.exporter.errors import ConfigError
from tests.support.checkpoints import VARIANTS

RELEASED = Path(__file__).parents[2] / "data/configs/minicpm-sala.json"


def read(**changes: Any) -> MiniCPMSALAConfig:
    return MiniCPMSALAConfig.from_dict(VARIANTS["sala"] | changes)


def test_the_released_config() -> None:
    config = MiniCPMSALAConfig.from_dict(json.loads(RELEASED.read_text()))
    sparse = [layer for layer in range(32) if not config.is_recurrent(layer)]
    assert sparse == [0, 9, 16, 17, 22, 29, 30, 31]
    assert config.layer_caches(0) == dict.fromkeys(("key", "value"), (2, "capacity", 128))
    assert config.layer_caches(1) == {"recurrent_state": (32, 128, 128)}
    attention, linear = config.attention_spec(0), config.linear_spec()
    assert (attention.topk, attention.budget, attention.dense_len) == (64, 96, 8192)
    assert linear.scale == 128**-0.5 and linear.num_heads == 32
    assert linear.decay[0] == pytest.approx(-0.8408964) and linear.decay[31] == -0.00390625
    assert config.max_context == 524288


def test_the_rotary_embedding_is_made_for_the_lightning_heads() -> None:
    config = read()
    assert (config.head_dim, config.lightning_head_dim) == (16, 24)
    assert config.rope.table(64).inv_freq.shape == (12,)


def test_dense_attention_leaves_the_lightning_layers_alone() -> None:
    config = read().with_attention("dense")
    assert isinstance(config, MiniCPMSALAConfig)
    assert config.attention_spec(1).is_dense and config.mixer_types == read().mixer_types


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_experts": 8}, "num_experts: expected 0, got 8"),
        ({"scale_depth": 0}, "scale_depth: expected a positive number, got 0.0"),
        ({"lightning_nh": None}, "lightning_nh: expected an integer, got nothing"),
        ({"lightning_head_dim": 0}, "lightning_head_dim: expected a positive integer, got 0"),
        ({"sparse_config": {"dense_len": -2}}, "sparse_config.dense_len: expected -1"),
        ({"mixer_types": None}, "mixer_types: expected an array, got nothing"),
        ({"mixer_types": ["minicpm4"]}, "mixer_types: expected 4 entries, one a layer, got 1"),
        (
            {"mixer_types": ["minicpm4"] * 3 + ["mamba"]},
            r"mixer_types\[3\]: expected minicpm4 or lightning-attn, got 'mamba'",
        ),
        ({"mixer_types": ["lightning-attn"] * 4}, "at least one minicpm4 layer, got none"),
        ({"lightning_nh": 6, "lightning_nkv": 6}, "lightning_nh: expected a power of two, got 6"),
        ({"lightning_nkv": 2}, "lightning_nkv: expected 4, got 2"),
        ({"lightning_head_dim": 15}, "lightning_head_dim: expected an even number, got 15"),
        ({"lightning_scale": "1/d"}, r"lightning_scale: expected 1/sqrt\(d\), got 1/d"),
        ({"attn_use_rope": True}, "attn_use_rope: expected false, got true"),
        ({"attn_use_output_gate": False}, "attn_use_output_gate: expected true, got false"),
        ({"lightning_use_rope": False}, "lightning_use_rope: expected true, got false"),
        ({"qk_norm": None}, "qk_norm: expected true, got nothing"),
        ({"use_output_norm": False}, "use_output_norm: expected true, got false"),
        ({"use_output_gate": False}, "use_output_gate: expected true, got false"),
        ({"sparse_config": {"use_nope": True}}, "sparse_config.use_nope: expected false, got true"),
    ],
)
def test_what_is_not_implemented_is_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        read(**changes)
