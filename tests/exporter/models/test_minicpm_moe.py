"""MiniCPM-MoE against transformers' Mixtral: equal experts and router, muP folded into the weights."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from tests.support.bundles import TARGETS, Bundles
from tests.support.checkpoints import Config, Tensors, config_of, tensors_of

TOLERANCE = 2e-3


def mixtral_tensors(config: Config, tensors: Tensors) -> Tensors:
    """The weights of a Mixtral that computes the same, by its names."""
    branch = np.float32(config["scale_depth"] / config["num_hidden_layers"] ** 0.5)
    head = np.float32(config["hidden_size"] / config["dim_model_base"])
    folded = {name: tensor for name, tensor in tensors.items() if ".experts." not in name}
    folded["model.embed_tokens.weight"] = folded["model.embed_tokens.weight"] * np.float32(
        config["scale_emb"]
    )
    folded["lm_head.weight"] = folded["lm_head.weight"] / head
    for layer in range(config["num_hidden_layers"]):
        prefix = f"model.layers.{layer}."
        folded[f"{prefix}self_attn.o_proj.weight"] = folded[f"{prefix}self_attn.o_proj.weight"] * branch
        experts = [
            {name: tensors[f"{prefix}mlp.experts.{e}.{name}.weight"] for name in ("w1", "w3", "w2")}
            for e in range(config["num_experts"])
        ]
        gate_up = np.stack([np.concatenate([expert["w1"], expert["w3"]]) for expert in experts])
        folded[f"{prefix}mlp.experts.gate_up_proj"] = gate_up
        folded[f"{prefix}mlp.experts.down_proj"] = np.stack([expert["w2"] for expert in experts]) * branch
    return folded


@pytest.fixture(scope="module")
def expected(bundles: Bundles) -> npt.NDArray[np.float32]:
    """Mixtral's logits (T, vocab)."""
    import torch
    from transformers import MixtralConfig, MixtralForCausalLM

    config, tensors = config_of("moe"), tensors_of("moe")
    shared = ["vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads"]
    shared += ["num_key_value_heads", "rms_norm_eps", "max_position_embeddings", "num_experts_per_tok"]
    settings: dict[str, Any] = {key: config[key] for key in shared}
    settings |= {"num_local_experts": config["num_experts"], "tie_word_embeddings": False, "rope_theta": 1e4}
    model: Any = MixtralForCausalLM(MixtralConfig(**settings))
    model.eval()
    weights = mixtral_tensors(config, tensors)
    model.load_state_dict({name: torch.from_numpy(np.array(array)) for name, array in weights.items()})
    with torch.no_grad():
        logits = model(torch.from_numpy(bundles.prompt)[None]).logits[0]
    return np.asarray(logits.numpy())


def test_the_modules_are_mixtral(bundles: Bundles, expected: npt.NDArray[np.float32]) -> None:
    assert np.abs(bundles.stored("moe", "ort") - expected).max() <= TOLERANCE


@pytest.mark.parametrize("target", TARGETS)
def test_the_bundles_are_mixtral(bundles: Bundles, target: str, expected: npt.NDArray[np.float32]) -> None:
    with bundles.engine("moe", target).session() as session:
        assert np.abs(session.forward(bundles.prompt, "all") - expected).max() <= TOLERANCE
