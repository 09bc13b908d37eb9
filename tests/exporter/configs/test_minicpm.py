from __future__ import annotations

from typing import Any

import pytest

from cpm_edge.exporter.configs import MiniCPMConfig
from cpm_edge.exporter.errors import ConfigError
from tests.support.checkpoints import VARIANTS

DENSE = {key: value for key, value in VARIANTS["sparse"].items() if key != "sparse_config"}
SPARSE = VARIANTS["sparse"]["sparse_config"]


def read(sparse: Any = None, **changes: Any) -> MiniCPMConfig:
    return MiniCPMConfig.from_dict(DENSE | changes | ({} if sparse is None else {"sparse_config": sparse}))


def test_the_scales_arrive() -> None:
    config = read()
    assert config.scale_emb == 1.5
    assert config.residual_scale == pytest.approx(1.2 / 2**0.5)
    assert config.logit_divisor == pytest.approx(64 / 24)


@pytest.mark.parametrize(
    ("hidden", "layers", "residual", "divisor"),
    [
        (4096, 32, 0.24748737, 16),
        (1024, 24, 0.28577380, 4),
        (1536, 52, 0.19414507, 6),
        (2304, 40, 0.22135944, 9),
    ],
)
def test_the_scales_of_the_releases(hidden: int, layers: int, residual: float, divisor: float) -> None:
    config = read(hidden_size=hidden, num_hidden_layers=layers, scale_depth=1.4, dim_model_base=256)
    assert config.residual_scale == pytest.approx(residual, rel=1e-7)
    assert config.logit_divisor == divisor


def test_minicpm_ties_unless_told_otherwise() -> None:
    assert read(tie_word_embeddings=None).tie_word_embeddings is True
    assert read().tie_word_embeddings is False


def test_a_sparse_config_fills_the_attention() -> None:
    spec = read(SPARSE).attention_spec(1)
    assert {key: spec.attributes()[key] for key in SPARSE} == SPARSE
    assert (spec.num_heads, spec.kv_num_heads, spec.scale) == (4, 2, 0.25)


def test_the_published_settings_are_the_defaults() -> None:
    spec = read({}).attention_spec(0)
    published = {
        "kernel_size": 32,
        "kernel_stride": 16,
        "init_blocks": 1,
        "block_size": 64,
        "window_size": 2048,
        "topk": 64,
        "dense_len": 8192,
        "coarse_lse": 1,
    }
    assert {key: spec.attributes()[key] for key in published} == published
    assert read(published | {"use_nope": False}) == read({})


def test_always_sparse() -> None:
    assert read(SPARSE | {"dense_len": -1}).attention_spec(0).dense_len == 0


@pytest.mark.parametrize(
    ("sparse", "message"),
    [
        ({"use_nope": True}, "sparse_config.use_nope: expected false, got true"),
        ({"kernel_size": 12}, "sparse_config.kernel_size: expected 8 for stride 4, got 12"),
        ({"block_size": 32}, "sparse_config.block_size: expected 16 for stride 4, got 32"),
        ({"window_size": 40}, "sparse_config.window_size: expected a multiple of 16, got 40"),
        ({"topk": 1}, r"sparse_config.topk: expected more than init_blocks \(1\), got 1"),
        ({"topk": 0}, "sparse_config.topk: expected a positive integer, got 0"),
        ({"kernel_stride": 0}, "sparse_config.kernel_stride: expected a positive integer, got 0"),
        ({"coarse_lse": 2}, "sparse_config.coarse_lse: expected 0 or 1, got 2"),
        ({"coarse_lse": True}, "sparse_config.coarse_lse: expected 0 or 1, got true"),
        ({"init_blocks": -1}, "sparse_config.init_blocks: expected 0 or more, got -1"),
        ({"init_blocks": 1.0}, "sparse_config.init_blocks: expected an integer, got 1.0"),
        ({"window_size": 0}, "sparse_config.window_size: expected a positive integer, got 0"),
        ({"dense_len": -2}, r"sparse_config.dense_len: expected -1 \(always sparse\) or a length, got -2"),
        ({"dense_len": "8k"}, "sparse_config.dense_len: expected an integer, got '8k'"),
        ({"switch": 1, "pool": 2}, "sparse_config: unknown keys pool, switch"),
    ],
)
def test_what_the_sparse_attention_refuses(sparse: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        read(SPARSE | sparse)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_experts": 8}, "num_experts: expected 0, got 8"),
        ({"dim_model_base": 0}, "dim_model_base: expected a positive integer, got 0"),
        ({"scale_emb": 0}, "scale_emb: expected a positive number, got 0.0"),
        ({"scale_depth": -1.4}, "scale_depth: expected a positive number, got -1.4"),
        ({"tie_word_embeddings": "yes"}, "tie_word_embeddings: expected true or false, got 'yes'"),
        ({"attention_bias": True}, "attention_bias: expected false, got true"),
        ({"scale_emb": "12"}, "scale_emb: expected a number, got '12'"),
        ({"hidden_act": "gelu"}, "hidden_act: expected silu or relu or fatrelu, got gelu"),
        ({"hidden_act": "fatrelu"}, "hidden_act_param: expected a number, got nothing"),
        (
            {"hidden_act": "fatrelu", "hidden_act_param": -0.1},
            "hidden_act_param: expected a threshold of 0 or more, got -0.1",
        ),
        ({"hidden_act": "fatrelu", "hidden_act_param": "x"}, "hidden_act_param: expected a number, got 'x'"),
        (
            {"hidden_act": "fatrelu", "hidden_act_param": float("nan")},
            "hidden_act_param: expected a number, got nan",
        ),
        ({"sparse_config": 5}, "sparse_config: expected an object, got 5"),
        ({"num_key_value_heads": 3}, "num_key_value_heads: expected a divisor of 4, got 3"),
    ],
)
def test_what_the_architecture_refuses(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        read(**changes)


def test_no_experts_is_an_ordinary_model() -> None:
    """MiniCPM-2B-128k says so in its config."""
    assert read(num_experts=0) == read()


def test_the_threshold_of_the_gate() -> None:
    assert read().gate_threshold is None
    assert read(hidden_act="relu").gate_threshold == 0
    assert read(hidden_act="fatrelu", hidden_act_param=0.01).gate_threshold == 0.01


def test_unknown_keys_are_told() -> None:
    with pytest.warns(UserWarning, match="keys without effect here: hidden_act_param"):
        read(hidden_act_param=0.03)


def test_the_attention_asked_for() -> None:
    dense, sparse = read(), read(SPARSE)
    assert sparse.with_attention("auto") is sparse and sparse.with_attention("sparse") is sparse
    assert sparse.with_attention("dense") == dense
    assert dense.with_attention("auto") is dense
    assert dense.with_attention("sparse").attention_spec(0).dense_len == 8192
