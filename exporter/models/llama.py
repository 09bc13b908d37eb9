"""Llama: RMSNorm, grouped-query attention with rotary embedding, SwiGLU."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from cpm_edge.exporter.configs import LlamaConfig
from cpm_edge.exporter.configs.rope import RopeTable
from cpm_edge.exporter.ops.sparse_attention import sparse_attention

Cache = tuple[Tensor, ...]  # what config.layer_caches names, with a batch in front
Rotation = tuple[Tensor, Tensor]  # cos, sin: (B, T, head_dim / 2)


class Attention(nn.Module):
    def __init__(self, config: LlamaConfig, layer: int) -> None:
        super().__init__()
        hidden, size = config.hidden_size, config.head_dim
        self.spec = config.attention_spec(layer)
        self.q_proj = nn.Linear(hidden, config.num_attention_heads * size, bias=False)
        self.k_proj = nn.Linear(hidden, config.num_key_value_heads * size, bias=False)
        self.v_proj = nn.Linear(hidden, config.num_key_value_heads * size, bias=False)
        self.o_proj = nn.Linear(config.num_attention_heads * size, hidden, bias=False)

    def forward(
        self, hidden: Tensor, rotation: Rotation, past_length: Tensor, cache: Cache
    ) -> tuple[Tensor, Cache]:
        """(B, T, hidden) in and out, with the cache that holds the new rows."""
        query = rotate(self.q_proj(hidden), rotation, self.spec.num_heads)
        key = rotate(self.k_proj(hidden), rotation, self.spec.kv_num_heads)
        value = self.v_proj(hidden)
        keys, values = cache
        output, *present = sparse_attention(query, key, value, keys, values, past_length, spec=self.spec)
        return self.o_proj(output), tuple(present)


class MLP(nn.Module):
    def __init__(self, config: LlamaConfig) -> None:
        super().__init__()
        hidden, wide = config.hidden_size, config.intermediate_size
        self.gate_proj = nn.Linear(hidden, wide, bias=False)
        self.up_proj = nn.Linear(hidden, wide, bias=False)
        self.down_proj = nn.Linear(wide, hidden, bias=False)
        self.gate_threshold = config.gate_threshold

    def forward(self, hidden: Tensor) -> Tensor:
        return self.down_proj(self.activation(self.gate_proj(hidden)) * self.up_proj(hidden))

    def activation(self, gate: Tensor) -> Tensor:
        if self.gate_threshold is None:
            return nn.functional.silu(gate)
        return nn.functional.threshold(gate, self.gate_threshold, 0.0)


class DecoderLayer(nn.Module):
    mlp_class: type[nn.Module] = MLP

    def __init__(self, config: LlamaConfig, layer: int) -> None:
        super().__init__()
        self.input_layernorm = nn.RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.self_attn: nn.Module = Attention(config, layer)
        self.post_attention_layernorm = nn.RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.mlp = self.mlp_class(config)

    def forward(
        self, hidden: Tensor, rotation: Rotation, past_length: Tensor, cache: Cache
    ) -> tuple[Tensor, Cache]:
        attended, present = self.self_attn(self.input_layernorm(hidden), rotation, past_length, cache)
        hidden = hidden + attended
        return hidden + self.mlp(self.post_attention_layernorm(hidden)), present


class Decoder(nn.Module):
    """The checkpoint's ``model.`` prefix."""

    layer_class: type[nn.Module] = DecoderLayer

    def __init__(self, config: LlamaConfig) -> None:
        super().__init__()
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(self.layer_class(config, i) for i in range(config.num_hidden_layers))
        self.norm = nn.RMSNorm(config.hidden_size, config.rms_norm_eps)


class Rotary(nn.Module):
    """The rotary frequencies: a buffer, so that the traced graph names it like a weight."""

    inv_freq: Tensor

    def __init__(self, size: int) -> None:
        super().__init__()
        self.register_buffer("inv_freq", torch.empty(size))


class Model(nn.Module):
    """The whole language model.

    Args:
        config: the checkpoint's config.
        rope: frequencies, fixed for the context of the bundle.
    """

    decoder_class: type[Decoder] = Decoder

    def __init__(self, config: LlamaConfig, rope: RopeTable) -> None:
        super().__init__()
        self.config = config
        self.rope_scaling = rope.scaling
        self.model = self.decoder_class(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        if config.tie_word_embeddings:
            self.lm_head.weight = self.model.embed_tokens.weight
        self.rotary = Rotary(len(rope.inv_freq))

    def embed(self, input_ids: Tensor, past_length: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """(B, T) ids to hidden (B, T, hidden) and the rotation of their positions."""
        position = past_length.unsqueeze(1) + torch.arange(input_ids.shape[1])
        angle = position.unsqueeze(2).float() * self.rotary.inv_freq
        cos, sin = angle.cos(), angle.sin()
        if self.rope_scaling != 1:
            cos, sin = cos * self.rope_scaling, sin * self.rope_scaling
        return self.model.embed_tokens(input_ids), cos, sin

    def head(self, hidden: Tensor) -> Tensor:
        """(B, T, hidden) to logits (B, T, vocab)."""
        return self.lm_head(self.model.norm(hidden))

    def forward(
        self, input_ids: Tensor, past_length: Tensor, caches: list[Cache]
    ) -> tuple[Tensor, list[Cache]]:
        """Logits (B, T, vocab) and the caches that hold the new rows.

        Args:
            input_ids: (B, T) int64.
            past_length: (B,) int64 rows already in the caches.
            caches: of each layer.
        """
        hidden, cos, sin = self.embed(input_ids, past_length)
        presents = []
        for layer, cache in zip(self.model.layers, caches, strict=True):
            hidden, present = layer(hidden, (cos, sin), past_length, cache)
            presents.append(present)
        return self.head(hidden), presents


def rotate(rows: Tensor, rotation: Rotation, heads: int) -> Tensor:
    """Rotary embedding of (B, T, heads * D), the halves of each head paired (NeoX)."""
    return torch.onnx.ops.rotary_embedding(rows, *rotation, num_heads=heads)
