"""Llama configs: MiniCPM5, BitCPM-CANN 1B/3B, the ``-llama-format`` releases, SmolLM2."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from cpm_edge.exporter.configs.reader import ConfigReader
from cpm_edge.exporter.configs.rope import Rope
from cpm_edge.exporter.errors import ConfigError
from cpm_edge.plugins.sparse_attention.spec import SparseAttentionSpec

# In the shape of a cache: as many rows as the context has room for.
CAPACITY = "capacity"
CacheShape = tuple[int | str, ...]


@dataclass(frozen=True)
class LlamaConfig:
    """Hugging Face's LlamaConfig, as far as it changes what is computed.

    Attributes:
        gate_threshold: None for SiLU on the MLP's gate; else gates above it pass as they are and all others
            become zero (FATReLU; ReLU when it is 0).
    """

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    rms_norm_eps: float
    max_position_embeddings: int
    tie_word_embeddings: bool
    rope: Rope
    gate_threshold: float | None

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> LlamaConfig:
        """Read a parsed config.json.

        Raises:
            ConfigError: a key is missing, malformed or asks for something not implemented.
        """
        reader = ConfigReader(data)
        config = cls(**read_decoder(reader, tied=False))
        reader.finish(strict=False)
        return config

    def attention_spec(self, layer: int) -> SparseAttentionSpec:
        """Attributes of the attention op of one layer."""
        return SparseAttentionSpec.dense(
            self.num_attention_heads, self.num_key_value_heads, self.head_dim**-0.5
        )

    def layer_kind(self, layer: int) -> str:
        """Layers of one kind have the same graph and are traced once."""
        return "decoder"

    def layer_caches(self, layer: int) -> dict[str, CacheShape]:
        """What one layer keeps of one sequence: shapes by the names of the graph's ports."""
        rows: CacheShape = (self.num_key_value_heads, CAPACITY, self.head_dim)
        return {"key": rows, "value": rows}

    @property
    def makes_choices(self) -> bool:
        """Whether rounding may turn a choice in an MLP: which expert, whether a gate passes."""
        return self.gate_threshold is not None

    @property
    def max_context(self) -> int:
        """The longest context the checkpoint was made for, in tokens."""
        return self.rope.longest


def read_decoder(reader: ConfigReader, *, tied: bool) -> dict[str, Any]:
    """The keys that llama and minicpm share, checked.

    Args:
        tied: what the architecture assumes when ``tie_word_embeddings`` is absent.
    """
    reader.only("attention_bias", (False,), False)
    reader.only("mlp_bias", (False,), False)
    hidden, heads = reader.positive("hidden_size"), reader.positive("num_attention_heads")
    kv_heads = reader.positive("num_key_value_heads", heads)
    if heads % kv_heads:
        raise ConfigError(f"num_key_value_heads: expected a divisor of {heads}, got {kv_heads}")
    if reader.get("head_dim", int, None) is None and hidden % heads:
        raise ConfigError(f"num_attention_heads: expected a divisor of hidden_size {hidden}, got {heads}")
    head_dim = reader.positive("head_dim", hidden // heads)
    if head_dim % 2:
        raise ConfigError(f"head_dim: expected an even number, got {head_dim}")
    longest = reader.positive("max_position_embeddings")
    return {
        "vocab_size": reader.positive("vocab_size"),
        "hidden_size": hidden,
        "intermediate_size": reader.positive("intermediate_size"),
        "num_hidden_layers": reader.positive("num_hidden_layers"),
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "head_dim": head_dim,
        "rms_norm_eps": reader.positive_number("rms_norm_eps", 1e-6),
        "max_position_embeddings": longest,
        "tie_word_embeddings": reader.get("tie_word_embeddings", bool, tied),
        "rope": Rope.read(reader, head_dim, longest),
        "gate_threshold": read_gate_threshold(reader),
    }


def read_gate_threshold(reader: ConfigReader) -> float | None:
    """``LlamaConfig.gate_threshold`` from ``hidden_act``, and ``hidden_act_param`` where that is fatrelu."""
    activation = reader.only("hidden_act", ("silu", "relu", "fatrelu"), "silu")
    if activation == "silu":
        return None
    threshold = reader.get("hidden_act_param", float) if activation == "fatrelu" else 0.0
    if threshold < 0:
        raise ConfigError(f"hidden_act_param: expected a threshold of 0 or more, got {threshold}")
    return threshold
