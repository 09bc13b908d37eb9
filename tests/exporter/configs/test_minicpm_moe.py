from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from cpm_edge.exporter.configs import MiniCPMMoEConfig
from cpm_edge.exporter.errors import ConfigError
from tests.support.checkpoints import VARIANTS

RELEASED = Path(__file__).parents[2] / "data/configs/minicpm-moe-8x2b.json"


def read(**changes: Any) -> MiniCPMMoEConfig:
    return MiniCPMMoEConfig.from_dict(VARIANTS["moe"] | changes)


def test_the_released_config() -> None:
    config = MiniCPMMoEConfig.from_dict(json.loads(RELEASED.read_text()))
    assert config.experts_spec().attributes() == {"num_experts": 8, "top_k": 2}
    assert config.residual_scale == pytest.approx(0.22135944, rel=1e-7) and config.logit_divisor == 9
    assert (config.head_dim, config.max_context, config.tie_word_embeddings) == (64, 4096, True)


def test_attention_is_chosen_as_for_minicpm() -> None:
    config = read().with_attention("sparse")
    assert isinstance(config, MiniCPMMoEConfig) and config.num_experts == 8
    assert not config.attention_spec(0).is_dense


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_experts": "8"}, "num_experts: expected an integer, got '8'"),
        ({"num_experts": -8}, "num_experts: expected a positive integer, got -8"),
        ({"num_experts_per_tok": None}, "num_experts_per_tok: expected an integer, got nothing"),
        ({"num_experts_per_tok": 0}, "num_experts_per_tok: expected a positive integer, got 0"),
        ({"num_experts_per_tok": 9}, r"num_experts_per_tok: expected at most num_experts \(8\), got 9"),
        ({"norm_topk_prob": False}, "norm_topk_prob: expected true, got false"),
        ({"scoring_func": "sigmoid"}, "scoring_func: expected softmax, got sigmoid"),
        ({"num_shared_experts": 2}, "num_shared_experts: expected 0, got 2"),
        ({"n_shared_experts": 1}, "n_shared_experts: expected 0, got 1"),
        ({"hidden_act": "relu"}, "hidden_act: expected silu, got relu"),
        ({"hidden_act": "fatrelu", "hidden_act_param": 0.03}, "hidden_act: expected silu, got fatrelu"),
    ],
)
def test_what_is_not_implemented_is_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        read(**changes)
