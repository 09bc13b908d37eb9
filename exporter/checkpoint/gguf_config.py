"""GGUF metadata as the config.json that the model's authors would have written."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np

from cpm_edge.exporter.errors import CheckpointError

ARCHITECTURES = {
    "llama": "LlamaForCausalLM",
    "minicpm": "MiniCPMForCausalLM",
    "minicpm3": "MiniCPM3ForCausalLM",
}
ORIGINAL_HINT = "export from the original Hugging Face checkpoint"
# Ends of a turn that converters leave out of eos_token_id; llama.cpp stops at them by their text, too.
END_OF_TURN = ("<|im_end|>", "<|eot_id|>", "<|end|>", "<|endoftext|>")


class Metadata:
    """Typed access to metadata; keys without a dot prefix are those of the architecture."""

    def __init__(self, values: Mapping[str, Any]) -> None:
        self.values = values
        self.architecture = values.get("general.architecture")

    def number(self, key: str, default: float | None = None) -> float:
        """A number of the architecture; integers stay int, float32 becomes the shortest equal decimal.

        Raises:
            CheckpointError: the key is missing without a default, or no number.
        """
        name = f"{self.architecture}.{key}"
        value = self.values.get(name, default)
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise CheckpointError(
                f"GGUF metadata {name}: expected a number, got {value!r}", hint=ORIGINAL_HINT
            )
        return float(str(np.float32(value))) if isinstance(value, float) else value

    def integer(self, key: str, default: int | None = None) -> int:
        """As ``number``, for integers."""
        value = self.number(key, default)
        if value != int(value):
            raise CheckpointError(
                f"GGUF metadata {self.architecture}.{key}: expected an integer, got {value}"
            )
        return int(value)

    def token_id(self, key: str) -> int | None:
        """``tokenizer.ggml.<key>_token_id``, None when absent."""
        value = self.values.get(f"tokenizer.ggml.{key}_token_id")
        return value if isinstance(value, int) else None


def build_config(
    values: Mapping[str, Any], hf_shapes: Mapping[str, tuple[int, ...]], rope: Mapping[str, list[float]]
) -> dict[str, Any]:
    """A config.json for the architectures llama, minicpm and minicpm3.

    Args:
        values: the metadata of the file.
        hf_shapes: shapes of the weights by Hugging Face name.
        rope: the contents of the rope tensors that the file has (``long``, ``short``, ``freqs``).

    Raises:
        CheckpointError: another architecture, experts, a rope scaling that is not known, missing keys.
    """
    metadata = Metadata(values)
    architecture = check_architecture(metadata)
    embedding = hf_shapes.get("model.embed_tokens.weight")
    if embedding is None:
        raise CheckpointError(
            "the GGUF file has no tensor token_embd.weight: it holds no language model", hint=ORIGINAL_HINT
        )
    hidden, heads = metadata.integer("embedding_length"), metadata.integer("attention.head_count")
    config: dict[str, Any] = {
        "architectures": [ARCHITECTURES[architecture]],
        "model_type": architecture,
        "vocab_size": embedding[0],
        "hidden_size": hidden,
        "intermediate_size": metadata.integer("feed_forward_length"),
        "num_hidden_layers": metadata.integer("block_count"),
        "num_attention_heads": heads,
        "num_key_value_heads": metadata.integer("attention.head_count_kv", heads),
        "hidden_act": "silu",
        "rms_norm_eps": metadata.number("attention.layer_norm_rms_epsilon"),
        "rope_theta": metadata.number("rope.freq_base", 10000.0),
        "rope_scaling": _rope_scaling(metadata, rope),
        "max_position_embeddings": metadata.integer("context_length"),
        "tie_word_embeddings": "lm_head.weight" not in hf_shapes,
        "attention_bias": any(".self_attn." in name and name.endswith(".bias") for name in hf_shapes),
        "mlp_bias": any(".mlp." in name and name.endswith(".bias") for name in hf_shapes),
        "bos_token_id": metadata.token_id("bos"),
        "eos_token_id": metadata.token_id("eos"),
    }
    if architecture == "minicpm3":
        config |= _latent(metadata, hf_shapes, heads)
    else:
        config["head_dim"] = _head_dim(metadata, hidden, heads)
    return config if architecture == "llama" else config | _mup(metadata, config)


def check_architecture(metadata: Metadata) -> str:
    """Refuse what is not a dense, whole model of one of ARCHITECTURES.

    Returns:
        Which one.

    Raises:
        CheckpointError: names what was found and what is supported.
    """
    architecture = metadata.architecture
    if architecture not in ARCHITECTURES:
        raise CheckpointError(
            f"GGUF architecture {architecture!r} is not supported, expected {', '.join(ARCHITECTURES)}",
            hint=ORIGINAL_HINT,
        )
    if metadata.integer("expert_count", 0) > 0:
        raise CheckpointError(
            f"a GGUF of architecture {architecture} with experts is not supported",
            hint="cpm-export --list-models shows what is supported",
        )
    if metadata.values.get("split.count", 0) > 1:
        raise CheckpointError(
            "the GGUF file is one part of several", hint="join them first: llama-gguf-split --merge PART OUT"
        )
    return str(architecture)


def build_generation_config(values: Mapping[str, Any]) -> dict[str, Any]:
    """Start and stop ids: the metadata's, and tokens known to end a turn."""
    metadata = Metadata(values)
    stops = [metadata.token_id(key) for key in ("eos", "eot", "eom")]
    tokens = values.get("tokenizer.ggml.tokens", [])
    stops += [index for index, token in enumerate(tokens) if token in END_OF_TURN]
    config: dict[str, Any] = {}
    if (bos := metadata.token_id("bos")) is not None:
        config["bos_token_id"] = bos
    if ids := list(dict.fromkeys(stop for stop in stops if stop is not None)):
        config["eos_token_id"] = ids
    return config


def _head_dim(metadata: Metadata, hidden: int, heads: int) -> int:
    rotary = metadata.integer("rope.dimension_count", hidden // heads)
    head_dim = metadata.integer("attention.key_length", rotary)
    if metadata.integer("attention.value_length", head_dim) != head_dim or rotary != head_dim:
        raise CheckpointError(
            f"GGUF metadata: expected key_length, value_length and rope.dimension_count to be equal, got "
            f"{head_dim}, {metadata.integer('attention.value_length', head_dim)} and {rotary}"
        )
    return head_dim


def _rope_scaling(metadata: Metadata, rope: Mapping[str, list[float]]) -> dict[str, Any] | None:
    name = f"{metadata.architecture}.rope.scaling"
    kind = metadata.values.get(f"{name}.type", "none")
    context = metadata.integer("context_length")
    if kind not in ("none", "linear", "longrope"):
        raise CheckpointError(
            f"GGUF metadata {name}.type: expected none, linear or longrope, got {kind}", hint=ORIGINAL_HINT
        )
    if "long" in rope and "short" in rope and kind != "linear":
        scaling: dict[str, Any] = {
            "rope_type": "longrope",
            "long_factor": rope["long"],
            "short_factor": rope["short"],
            "original_max_position_embeddings": metadata.integer(
                "rope.scaling.original_context_length", context
            ),
        }
        if (attention := metadata.number("rope.scaling.attn_factor", 1.0)) != 1.0:
            scaling["attention_factor"] = attention
        return scaling
    if kind == "longrope" or "long" in rope or "short" in rope:
        raise CheckpointError(f"GGUF: {name}.type {kind} does not fit the rope_factors tensors of the file")
    factor = metadata.number("rope.scaling.factor", 1.0)
    if kind == "linear" and factor != 1.0:
        return {"rope_type": "linear", "factor": factor}
    if any(value != 1.0 for value in rope.get("freqs", [])):
        # Llama 3 scaling reduced to its factors; equal lists and lengths leave the attention factor at 1.
        factors = rope["freqs"]
        return {
            "rope_type": "longrope",
            "long_factor": factors,
            "short_factor": factors,
            "original_max_position_embeddings": context,
        }
    return None


def _latent(
    metadata: Metadata, hf_shapes: Mapping[str, tuple[int, ...]], heads: int
) -> dict[str, int | float]:
    """MiniCPM3's sizes; that of a value head is not written and follows from the rows of kv_b_proj."""
    rotary = metadata.integer("rope.dimension_count")
    plain = metadata.integer("attention.key_length") - rotary
    name = "model.layers.0.self_attn.kv_b_proj.weight"
    rows = hf_shapes.get(name, (0,))[0]
    value, rest = divmod(rows, heads)
    if rest or plain < 1 or value <= plain:
        raise CheckpointError(
            f"the GGUF tensor of {name}: expected rows for {heads} heads of more than {plain} (key_length "
            f"less rope.dimension_count), got {rows}",
            hint=ORIGINAL_HINT,
        )
    return {
        "head_dim": rotary,  # as transformers writes it
        "q_lora_rank": metadata.integer("attention.q_lora_rank"),
        "kv_lora_rank": metadata.integer("attention.kv_lora_rank"),
        "qk_nope_head_dim": plain,
        "qk_rope_head_dim": rotary,
        "v_head_dim": value - plain,
    }


def _mup(metadata: Metadata, config: Mapping[str, Any]) -> dict[str, Any]:
    """MiniCPM's scales; files without these keys (old ones, and all of minicpm3) mean those of MiniCPM-2B."""
    depth, logit = "residual_scale", "logit_scale"
    root = math.sqrt(config["num_hidden_layers"])
    scale_depth = metadata.number(depth, 1.4 / root) * root
    base = config["hidden_size"] / metadata.number(logit, config["hidden_size"] / 256)
    return {
        "scale_emb": _round(metadata.number("embedding_scale", 12.0)),
        "scale_depth": _round(scale_depth),
        "dim_model_base": _round(base),
    }


def _round(value: float) -> float | int:
    """Seven significant digits, what float32 metadata carries; whole numbers as int."""
    rounded = float(f"{value:.7g}")
    return int(rounded) if rounded.is_integer() else rounded
