"""MiniCPM-SALA: MiniCPM whose layers attend sparsely, or linearly over a state that does not grow."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from cpm_edge.exporter.configs import MiniCPMSALAConfig
from cpm_edge.exporter.models import llama, minicpm
from cpm_edge.exporter.models.llama import Cache, Rotation, rotate
from cpm_edge.exporter.ops.linear_attention import linear_attention
from cpm_edge.exporter.ops.sparse_attention import sparse_attention


class SparseAttention(llama.Attention):
    """InfLLM-V2 without rotary embedding, its output gated by the layer's input."""

    def __init__(self, config: MiniCPMSALAConfig, layer: int) -> None:
        super().__init__(config, layer)
        self.o_gate = nn.Linear(config.hidden_size, config.num_attention_heads * config.head_dim, bias=False)

    def forward(
        self, hidden: Tensor, rotation: Rotation, past_length: Tensor, cache: Cache
    ) -> tuple[Tensor, Cache]:
        """(B, T, hidden) in and out, with the cache that holds the new rows."""
        query, key, value = self.q_proj(hidden), self.k_proj(hidden), self.v_proj(hidden)
        keys, values = cache
        output, *present = sparse_attention(query, key, value, keys, values, past_length, spec=self.spec)
        return self.o_proj(output * torch.sigmoid(self.o_gate(hidden))), tuple(present)


class LightningAttention(nn.Module):
    """Linear attention with a constant decay a head; queries and keys are normalized, then rotated."""

    def __init__(self, config: MiniCPMSALAConfig) -> None:
        super().__init__()
        hidden, size = config.hidden_size, config.lightning_head_dim
        self.spec = config.linear_spec()
        width = self.spec.num_heads * size
        self.q_proj = nn.Linear(hidden, width, bias=False)
        self.k_proj = nn.Linear(hidden, width, bias=False)
        self.v_proj = nn.Linear(hidden, width, bias=False)
        self.z_proj = nn.Linear(hidden, width, bias=False)
        self.o_proj = nn.Linear(width, hidden, bias=False)
        self.q_norm = nn.RMSNorm(size, config.rms_norm_eps)
        self.k_norm = nn.RMSNorm(size, config.rms_norm_eps)
        self.o_norm = nn.RMSNorm(width, config.rms_norm_eps)

    def forward(
        self, hidden: Tensor, rotation: Rotation, past_length: Tensor, cache: Cache
    ) -> tuple[Tensor, Cache]:
        """(B, T, hidden) in and out, with the state (B, heads, D, D) after the last row."""
        heads = self.spec.num_heads
        query = rotate(_normalized(self.q_proj(hidden), self.q_norm, heads), rotation, heads)
        key = rotate(_normalized(self.k_proj(hidden), self.k_norm, heads), rotation, heads)
        output, state = linear_attention(query, key, self.v_proj(hidden), *cache, spec=self.spec)
        return self.o_proj(self.o_norm(output) * torch.sigmoid(self.z_proj(hidden))), (state,)


def _normalized(rows: Tensor, norm: nn.Module, heads: int) -> Tensor:
    """(B, T, heads * D), every head by itself."""
    split: Tensor = norm(rows.view(*rows.shape[:2], heads, -1))
    return split.flatten(-2)


class DecoderLayer(minicpm.DecoderLayer):
    def __init__(self, config: MiniCPMSALAConfig, layer: int) -> None:
        super().__init__(config, layer)
        recurrent = config.is_recurrent(layer)
        self.self_attn = LightningAttention(config) if recurrent else SparseAttention(config, layer)


class Decoder(minicpm.Decoder):
    layer_class = DecoderLayer


class Model(minicpm.Model):
    decoder_class = Decoder
