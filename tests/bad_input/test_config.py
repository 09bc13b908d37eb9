from __future__ import annotations

from typing import Any

import pytest

from tests.bad_input.bench import Bench

_UNIMPLEMENTED = "see cpm-export --list-models"


@pytest.mark.parametrize(
    "names", [["MambaForCausalLM"], "MambaForCausalLM", [], None, 5, [["LlamaForCausalLM"]]]
)
def test_an_unknown_architecture(bench: Bench, names: Any) -> None:
    bench.edit("config.json", architectures=names)
    got = "MambaForCausalLM" if "Mamba" in str(names) else "got"
    bench.export_fails().says("architectures: expected one of LlamaForCausalLM", got, hint="--list-models")


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        (
            {"rope_scaling": {"rope_type": "yarn", "factor": 4.0}},
            ["rope_scaling.rope_type: expected", "got yarn"],
        ),
        ({"rope_scaling": {"type": "su"}}, ["rope_scaling.rope_type: expected", "got su"]),
        ({"rope_parameters": {"rope_type": "llama3"}}, ["rope_parameters.rope_type: expected", "got llama3"]),
        (
            {"rope_scaling": {"rope_type": "linear"}},
            ["rope_scaling.factor: expected a number", "got nothing"],
        ),
        (
            {"rope_scaling": {"rope_type": "linear", "factor": 2.0, "mystery": 1}},
            ["rope_scaling: unknown keys mystery"],
        ),
        (
            {"rope_scaling": {"rope_type": "longrope", "long_factor": [1.0], "short_factor": [1.0] * 16}},
            ["rope_scaling.long_factor: expected 16 numbers, got 1"],
        ),
        ({"hidden_act": "gelu"}, ["hidden_act: expected silu or relu or fatrelu, got gelu"]),
        ({"attention_bias": True}, ["attention_bias: expected false, got true"]),
        ({"mlp_bias": True}, ["mlp_bias: expected false, got true"]),
        ({"num_key_value_heads": 3}, ["num_key_value_heads: expected a divisor of 4, got 3"]),
        ({"hidden_size": -1}, ["hidden_size: expected a positive integer, got -1"]),
        ({"hidden_size": "64"}, ["hidden_size: expected an integer, got '64'"]),
        ({"hidden_size": None}, ["hidden_size: expected an integer, got nothing"]),
        ({"rms_norm_eps": float("nan")}, ["rms_norm_eps: expected a number, got nan"]),
        ({"tie_word_embeddings": 1}, ["tie_word_embeddings: expected true or false, got 1"]),
    ],
)
def test_a_config_value(bench: Bench, changes: dict[str, Any], words: list[str]) -> None:
    bench.edit("config.json", **changes)
    bench.export_fails().says(*words, hint=_UNIMPLEMENTED)


def test_unknown_keys_are_told_once_and_do_no_harm(bench: Bench) -> None:
    bench.edit("config.json", mystery=1, another_mystery={"a": 2})
    result = bench.export()
    assert result.exit_code == 0
    warnings = [line for line in result.stderr.splitlines() if line.startswith("warning:")]
    assert warnings == ["warning: config.json: keys without effect here: another_mystery, mystery"]


def test_unknown_keys_are_told_when_the_export_fails_too(bench: Bench) -> None:
    bench.edit("config.json", mystery=1)
    refusal = bench.export_fails("--max-context", "99999")
    assert refusal.warnings == ["config.json: keys without effect here: mystery"]
