from __future__ import annotations

import warnings
from typing import Any

import pytest

from cpm_edge.exporter.configs import LlamaConfig
from cpm_edge.exporter.errors import ConfigError
from tests.support.checkpoints import VARIANTS

LLAMA = VARIANTS["llama"]
REQUIRED = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "max_position_embeddings",
)


def test_every_key_arrives() -> None:
    config = LlamaConfig.from_dict(LLAMA)
    for key in (*REQUIRED, "num_key_value_heads", "head_dim", "rms_norm_eps", "tie_word_embeddings"):
        assert getattr(config, key) == LLAMA[key]
    assert config.rope.theta == 5e5 and config.rope.head_dim == 32
    assert config.max_context == 1024
    spec = config.attention_spec(0)
    assert spec.is_dense and (spec.num_heads, spec.kv_num_heads, spec.scale) == (4, 2, 32**-0.5)
    assert {config.layer_kind(layer) for layer in range(3)} == {"decoder"}


def test_what_is_absent_has_hugging_faces_default() -> None:
    config = LlamaConfig.from_dict({key: LLAMA[key] for key in REQUIRED})
    assert config.num_key_value_heads == 4
    assert config.head_dim == 16
    assert config.rms_norm_eps == 1e-6
    assert config.tie_word_embeddings is False
    assert (config.rope.theta, config.rope.kind) == (1e4, "default")


@pytest.mark.parametrize("key", REQUIRED)
def test_what_has_no_default_is_asked_for(key: str) -> None:
    with pytest.raises(ConfigError, match=f"{key}: expected an integer, got nothing"):
        LlamaConfig.from_dict({k: v for k, v in LLAMA.items() if k != key})
    with pytest.raises(ConfigError, match=f"{key}: expected a positive integer, got 0"):
        LlamaConfig.from_dict(LLAMA | {key: 0})


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"hidden_act": "gelu"}, "hidden_act: expected silu or relu or fatrelu, got gelu"),
        ({"hidden_act": "fatrelu"}, "hidden_act_param: expected a number, got nothing"),
        ({"attention_bias": True}, "attention_bias: expected false, got true"),
        ({"mlp_bias": True}, "mlp_bias: expected false, got true"),
        ({"mlp_bias": 0}, "mlp_bias: expected false, got 0"),
        ({"num_key_value_heads": 3}, "num_key_value_heads: expected a divisor of 4, got 3"),
        (
            {"head_dim": None, "num_attention_heads": 6},
            "num_attention_heads: expected a divisor of hidden_size",
        ),
        ({"head_dim": 15}, "head_dim: expected an even number, got 15"),
        ({"rope_scaling": {"rope_type": "yarn"}}, "rope_scaling.rope_type: expected .*, got yarn"),
        ({"rope_theta": 0}, "rope_theta: expected a positive number, got 0.0"),
        ({"rms_norm_eps": 0}, "rms_norm_eps: expected a positive number, got 0.0"),
        ({"num_key_value_heads": 0}, "num_key_value_heads: expected a positive integer, got 0"),
        ({"vocab_size": 2**31}, "vocab_size: expected at most 2147483647, got 2147483648"),
        ({"num_hidden_layers": 2.0}, "num_hidden_layers: expected an integer, got 2.0"),
        ({"rms_norm_eps": "small"}, "rms_norm_eps: expected a number, got 'small'"),
        ({"tie_word_embeddings": "no"}, "tie_word_embeddings: expected true or false, got 'no'"),
    ],
)
def test_what_is_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        LlamaConfig.from_dict(LLAMA | changes)


def test_null_counts_as_absent() -> None:
    nulls = {"rope_scaling": None, "head_dim": None, "attention_bias": None}
    assert LlamaConfig.from_dict(LLAMA | nulls).head_dim == 16


def test_unknown_keys_are_told() -> None:
    with pytest.warns(UserWarning, match=r"keys without effect here: sliding_window, use_flash$"):
        LlamaConfig.from_dict(LLAMA | {"use_flash": True, "sliding_window": 7, "torch_dtype": "bfloat16"})
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        LlamaConfig.from_dict(LLAMA)
