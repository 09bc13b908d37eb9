"""MiniCPM3 config: multi-head latent attention (MLA), muP scales, LongRoPE."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from cpm_edge.exporter.configs.llama import CAPACITY, CacheShape
from cpm_edge.exporter.configs.minicpm import MuPConfig
from cpm_edge.exporter.configs.reader import ConfigReader
from cpm_edge.exporter.configs.rope import Rope
from cpm_edge.exporter.errors import ConfigError
from cpm_edge.plugins.sparse_attention.spec import SparseAttentionSpec

# The normalizations of the latents do not take rms_norm_eps: the published model and transformers agree.
LATENT_EPS = 1e-6


@dataclass(frozen=True)
class MiniCPM3Config(MuPConfig):
    """Hugging Face's MiniCPM3Config, as far as it changes what is computed.

    ``head_dim`` is the size of a query or key head, qk_nope_head_dim + qk_rope_head_dim; every head has keys
    of its own. What is cached of a token is one row for all heads, ``latent_size`` wide.

    Attributes:
        q_lora_rank: size of the query latent.
        kv_lora_rank: size of the latent that keys and values of all heads are made of.
        qk_nope_head_dim: columns of a head without position.
        qk_rope_head_dim: rotated columns; those of the key are shared by all heads.
        v_head_dim: size of a value head.
    """

    q_lora_rank: int = 1
    kv_lora_rank: int = 1
    qk_nope_head_dim: int = 1
    qk_rope_head_dim: int = 2
    v_head_dim: int = 1

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> MiniCPM3Config:
        """Read a parsed config.json.

        Raises:
            ConfigError: a key is missing, malformed or asks for something not implemented.
        """
        reader = ConfigReader(data)
        for key, allowed in _ONLY.items():
            reader.only(key, (allowed,), allowed)
        config = cls(**_read(reader))
        reader.finish(strict=False)
        return config

    def attention_spec(self, layer: int) -> SparseAttentionSpec:
        return SparseAttentionSpec.latent(self.num_attention_heads, self.head_dim**-0.5, self.kv_lora_rank)

    def layer_caches(self, layer: int) -> dict[str, CacheShape]:
        return {"key": (1, CAPACITY, self.latent_size)}

    @property
    def latent_size(self) -> int:
        """Columns of a cached row: the latent and the rotated key."""
        return self.kv_lora_rank + self.qk_rope_head_dim

    @property
    def expanded_size(self) -> int:
        """Values a layer would cache of a token if it kept the keys and values of every head."""
        return self.num_attention_heads * (self.head_dim + self.v_head_dim)


_ONLY: dict[str, Any] = {
    "hidden_act": "silu",
    "attention_bias": False,
    "mlp_bias": False,
    "num_experts": 0,
    "sparse_config": None,
}


def _read(reader: ConfigReader) -> dict[str, Any]:
    hidden, heads = reader.positive("hidden_size"), reader.positive("num_attention_heads")
    rope_size, longest = reader.positive("qk_rope_head_dim"), reader.positive("max_position_embeddings")
    nope_size = reader.positive("qk_nope_head_dim")
    reader.only("num_key_value_heads", (heads,), heads)
    # transformers writes these two.
    reader.only("head_dim", (rope_size,), rope_size)
    reader.only("qk_head_dim", (nope_size + rope_size,), nope_size + rope_size)
    if rope_size % 2:
        raise ConfigError(f"qk_rope_head_dim: expected an even number, got {rope_size}")
    if reader.get("v_head_dim", int, None) is None and hidden % heads:
        raise ConfigError(f"num_attention_heads: expected a divisor of hidden_size {hidden}, got {heads}")
    return {
        "vocab_size": reader.positive("vocab_size"),
        "hidden_size": hidden,
        "intermediate_size": reader.positive("intermediate_size"),
        "num_hidden_layers": reader.positive("num_hidden_layers"),
        "num_attention_heads": heads,
        "num_key_value_heads": heads,
        "head_dim": nope_size + rope_size,
        "rms_norm_eps": reader.positive_number("rms_norm_eps", 1e-6),
        "max_position_embeddings": longest,
        "tie_word_embeddings": reader.get("tie_word_embeddings", bool, True),
        "rope": Rope.read(reader, rope_size, longest),
        "gate_threshold": None,
        # The published code and transformers assume different defaults, so these must be there.
        "scale_emb": reader.positive_number("scale_emb"),
        "scale_depth": reader.positive_number("scale_depth"),
        "dim_model_base": reader.positive("dim_model_base"),
        "q_lora_rank": reader.positive("q_lora_rank"),
        "kv_lora_rank": reader.positive("kv_lora_rank"),
        "qk_nope_head_dim": nope_size,
        "qk_rope_head_dim": rope_size,
        "v_head_dim": reader.positive("v_head_dim", hidden // heads),
    }
