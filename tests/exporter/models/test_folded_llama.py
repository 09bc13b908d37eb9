"""MiniCPM against transformers' Llama, an implementation that nobody here wrote.

Without sparse attention, MiniCPM is Llama with other weights: embeddings times scale_emb, every o_proj and
down_proj times the residual scale, the head divided by hidden_size / dim_model_base. A tied head is untied
first.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from cpm_edge.exporter import eager
from cpm_edge.exporter.registry import find_architecture
from tests.support.checkpoints import Config, Tensors, config_of, prompt, tensors_of

TOLERANCE = 1e-4
DENSE = ["tied-mha", "longrope", "dynamic-ntk"]
EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"
# Longer than original_max_position_embeddings of longrope and max_position_embeddings of dynamic-ntk (256),
# so that both change their frequencies.
IDS = prompt(300)
SCALES = ("scale_emb", "scale_depth", "dim_model_base")


def folded(config: Config, tensors: Tensors) -> Tensors:
    """The weights of the Llama model that computes the same."""
    residual = config["scale_depth"] / config["num_hidden_layers"] ** 0.5
    result = dict(tensors)
    result[HEAD] = tensors.get(HEAD, tensors[EMBEDDING]) * (config["dim_model_base"] / config["hidden_size"])
    result[EMBEDDING] = tensors[EMBEDDING] * config["scale_emb"]
    for name in tensors:
        if name.endswith(("o_proj.weight", "down_proj.weight")):
            result[name] = tensors[name] * residual
    return {name: np.asarray(tensor, np.float32) for name, tensor in result.items()}


def llama_logits(config: Config, tensors: Tensors) -> npt.NDArray[np.float32]:
    """transformers' logits (T, vocab) of IDS."""
    settings = {key: value for key, value in config.items() if key not in (*SCALES, "architectures")}
    settings |= {"model_type": "llama", "tie_word_embeddings": False, "attn_implementation": "eager"}
    model: Any = LlamaForCausalLM(LlamaConfig(**settings))
    model.eval()
    model.load_state_dict({name: torch.from_numpy(tensor) for name, tensor in tensors.items()})
    with torch.no_grad():
        return np.asarray(model(torch.from_numpy(IDS)[None]).logits[0].numpy())


def our_logits(config: Config, tensors: Tensors) -> npt.NDArray[np.float32]:
    """Logits (T, vocab) of the torch modules, with the frequencies for a context of the prompt's length."""
    entry = find_architecture(config)
    parsed = entry.config.from_dict(config)
    rope = parsed.rope.table(len(IDS))
    weights = tensors | {"rotary.inv_freq": rope.inv_freq}
    return eager.run_streamed(entry.model_class(), parsed, rope, weights.__getitem__, IDS.tolist()).logits


@pytest.mark.parametrize("variant", DENSE)
def test_minicpm_is_llama_with_folded_weights(variant: str) -> None:
    config, tensors = config_of(variant), tensors_of(variant)
    expected = llama_logits(config, folded(config, tensors))
    assert expected.std() > 2
    np.testing.assert_allclose(our_logits(config, tensors), expected, atol=TOLERANCE)


@pytest.mark.parametrize("variant", ["llama", "ternary-llama"])
def test_llama_is_llama(variant: str) -> None:
    """The second is ternary, with LongRoPE, as BitCPM-CANN 1B and 3B are."""
    config, tensors = config_of(variant), tensors_of(variant)
    np.testing.assert_allclose(our_logits(config, tensors), llama_logits(config, tensors), atol=TOLERANCE)


@pytest.mark.parametrize("key", SCALES)
def test_a_scale_forgotten_would_show(key: str) -> None:
    config, tensors = config_of("longrope"), tensors_of("longrope")
    expected = llama_logits(config, folded(config, tensors))
    wrong = our_logits(config | {key: config[key] * 2}, tensors)
    assert np.abs(wrong - expected).max() > 100 * TOLERANCE
