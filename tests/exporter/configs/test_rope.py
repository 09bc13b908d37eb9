"""RoPE tables against transformers' own, which compute them for a length at hand."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest

from cpm_edge.exporter.configs.reader import ConfigReader
from cpm_edge.exporter.configs.rope import Rope
from cpm_edge.exporter.errors import ConfigError

HEAD = 16
LONG = [round(1.1 + 0.9 * i, 3) for i in range(HEAD // 2)]
SHORT = [round(1 + 0.03 * i, 3) for i in range(HEAD // 2)]
LONGROPE = {"rope_type": "longrope", "long_factor": LONG, "short_factor": SHORT}


def read(config: dict[str, Any], max_position: int = 512) -> Rope:
    return Rope.read(ConfigReader(config), HEAD, max_position)


@pytest.mark.parametrize(
    ("scaling", "context"),
    [
        ({"rope_type": "default"}, 512),
        ({"rope_type": "linear", "factor": 2.5}, 512),
        ({"rope_type": "dynamic", "factor": 4.0}, 100),
        ({"rope_type": "dynamic", "factor": 4.0}, 1000),
        ({"rope_type": "dynamic", "factor": 4.0}, 2048),
        (LONGROPE | {"original_max_position_embeddings": 128}, 128),
        (LONGROPE | {"original_max_position_embeddings": 128}, 129),
        (LONGROPE | {"original_max_position_embeddings": 512}, 512),
        (LONGROPE | {"original_max_position_embeddings": 128, "factor": 32.0}, 300),
        (LONGROPE | {"original_max_position_embeddings": 128, "attention_factor": 1.7}, 300),
    ],
)
def test_tables_are_those_of_transformers(scaling: dict[str, Any], context: int) -> None:
    import torch
    from transformers import LlamaConfig
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    config = LlamaConfig(
        hidden_size=4 * HEAD,
        num_attention_heads=4,
        max_position_embeddings=512,
        rope_parameters={"rope_theta": 2e4, **scaling},
    )
    kind = scaling["rope_type"]
    if kind == "default":
        exponent = torch.arange(0, HEAD, 2) / HEAD
        frequencies, factor = 1 / 2e4**exponent, 1.0
    else:
        frequencies, factor = ROPE_INIT_FUNCTIONS[kind](config, device="cpu", seq_len=context)
    table = read({"rope_theta": 2e4, "rope_scaling": scaling}).table(context)
    assert table.inv_freq.dtype == np.float32
    np.testing.assert_allclose(table.inv_freq, frequencies.numpy(), rtol=1e-6)
    assert table.scaling == pytest.approx(factor, rel=1e-12)


def test_the_spellings_of_configs_mean_the_same() -> None:
    scaling = {"factor": 2.0}
    old = read({"rope_theta": 5e5, "rope_scaling": {"type": "linear", **scaling}})
    new = read({"rope_theta": 5e5, "rope_scaling": {"rope_type": "linear", **scaling}})
    both = read({"rope_theta": 5e5, "rope_scaling": {"type": "linear", "rope_type": "linear", **scaling}})
    version5 = read({"rope_parameters": {"rope_type": "linear", "rope_theta": 5e5, **scaling}})
    assert old == new == both == version5
    assert read({}) == read({"rope_scaling": None}) == read({"rope_theta": 1e4})


def test_the_list_depends_on_the_context_and_the_factor_does_not() -> None:
    rope = read({"rope_scaling": LONGROPE | {"original_max_position_embeddings": 128}})
    short, long = rope.table(128), rope.table(129)
    assert "short list for 128 tokens" in short.note and "long list for 129 tokens" in long.note
    np.testing.assert_allclose(short.inv_freq * SHORT, long.inv_freq * LONG, rtol=1e-6)
    expected = math.sqrt(1 + math.log(4) / math.log(128))
    assert short.scaling == long.scaling == pytest.approx(expected)
    assert rope.longest == 512


def test_the_released_lists_need_no_attention_factor() -> None:
    """MiniCPM4: the original length is the whole length, given at the top level or in rope_scaling."""
    inside = read({"rope_scaling": LONGROPE | {"original_max_position_embeddings": 512}})
    outside = read({"rope_scaling": LONGROPE, "original_max_position_embeddings": 512})
    assert inside == outside == read({"rope_scaling": LONGROPE})
    assert inside.table(512).scaling == 1.0


def test_dynamic_ntk_serves_the_stretched_context() -> None:
    rope = read({"rope_scaling": {"type": "dynamic", "factor": 4}})
    assert rope.longest == 2048
    plain = read({}).table(512)
    np.testing.assert_array_equal(rope.table(512).inv_freq, plain.inv_freq)
    assert "dynamic NTK" in rope.table(2048).note
    # The base grows, so every frequency but the first falls.
    assert (rope.table(2048).inv_freq[1:] < plain.inv_freq[1:]).all()
    assert rope.table(2048).inv_freq[0] == 1


@pytest.mark.parametrize(
    ("scaling", "message"),
    [
        ({"rope_type": "yarn", "factor": 4.0}, "rope_type: expected default or linear .*, got yarn"),
        ({"type": "su"}, "rope_type: expected .*, got su"),
        ({"rope_type": "linear"}, "factor: expected a number, got nothing"),
        ({"rope_type": "linear", "factor": "2"}, "factor: expected a number, got '2'"),
        ({"rope_type": "linear", "factor": 0}, "factor: expected a positive number, got 0.0"),
        ({"rope_type": "dynamic", "factor": -4.0}, "factor: expected a positive number, got -4.0"),
        ({"rope_type": "linear", "factor": 1.0, "rope_theta": 0}, "rope_theta: expected a positive number"),
        ({"rope_type": "linear", "factor": 2.0, "low_freq_factor": 1}, "unknown keys low_freq_factor"),
        (
            {"rope_type": "default", "partial_rotary_factor": 0.5},
            "partial_rotary_factor: expected 1.0, got 0.5",
        ),
        (
            {"rope_type": "longrope", "short_factor": SHORT},
            "long_factor: expected 8 positive numbers, got None",
        ),
        (LONGROPE | {"long_factor": LONG[:7]}, "long_factor: expected 8 numbers, got 7"),
        (LONGROPE | {"short_factor": [*SHORT[:7], 0]}, "short_factor: expected 8 positive numbers"),
        (LONGROPE | {"long_factor": [True] * 8}, "long_factor: expected 8 positive numbers"),
        (
            LONGROPE | {"original_max_position_embeddings": 0},
            "original_max_position_embeddings: expected a pos",
        ),
        (
            LONGROPE | {"original_max_position_embeddings": 1},
            "original_max_position_embeddings: expected at least 2, got 1",
        ),
        (LONGROPE | {"attention_factor": 0}, "attention_factor: expected a positive number, got 0"),
        (LONGROPE | {"factor": -1.0}, "factor: expected a positive number, got -1.0"),
        (LONGROPE | {"short_mscale": 1.2}, "unknown keys short_mscale"),
        ("linear", "expected an object, got 'linear'"),
    ],
)
@pytest.mark.parametrize("section", ["rope_scaling", "rope_parameters"])
def test_what_is_refused(section: str, scaling: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=f"{section}.*{message}"):
        read({section: scaling})
