"""MiniCPM3: MiniCPM with multi-head latent attention (DeepSeek-V2, section 2.1) in absorbed form.

    q    = W_qb RMS(W_qa x)                   a head: [q_nope | q_rope]
    c, k = W_kva x; c = RMS(c)                one latent and one rotated key for all heads
    W_kvb                                     a head: [W_k | W_v], from the latent to its keys and values

A head's scores are q_nope . (W_k c) + q_rope . k = (W_k^T q_nope) . c + q_rope . k, and its output is
W_v (sum p c). So attention runs on the rows [c | k] themselves: they are all that is cached.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from cpm_edge.exporter.configs import MiniCPM3Config
from cpm_edge.exporter.configs.minicpm3 import LATENT_EPS
from cpm_edge.exporter.models import minicpm
from cpm_edge.exporter.models.llama import Cache, Rotation, rotate
from cpm_edge.exporter.ops.sparse_attention import sparse_attention


class LatentAttention(nn.Module):
    def __init__(self, config: MiniCPM3Config, layer: int) -> None:
        super().__init__()
        hidden, heads = config.hidden_size, config.num_attention_heads
        self.spec = config.attention_spec(layer)
        self.nope, self.rank = config.qk_nope_head_dim, config.kv_lora_rank
        self.q_a_proj = nn.Linear(hidden, config.q_lora_rank, bias=False)
        self.q_a_layernorm = nn.RMSNorm(config.q_lora_rank, LATENT_EPS)
        self.q_b_proj = nn.Linear(config.q_lora_rank, heads * config.head_dim, bias=False)
        self.kv_a_proj_with_mqa = nn.Linear(hidden, config.latent_size, bias=False)
        self.kv_a_layernorm = nn.RMSNorm(config.kv_lora_rank, LATENT_EPS)
        self.kv_b_proj = nn.Linear(config.kv_lora_rank, heads * (self.nope + config.v_head_dim), bias=False)
        self.o_proj = nn.Linear(heads * config.v_head_dim, hidden, bias=False)

    def forward(
        self, hidden: Tensor, rotation: Rotation, past_length: Tensor, cache: Cache
    ) -> tuple[Tensor, Cache]:
        """(B, T, hidden) in and out, with the cache (B, 1, C, latent_size) that holds the new rows."""
        heads, nope, rank = self.spec.num_heads, self.nope, self.rank
        query = _heads(self.q_b_proj(self.q_a_layernorm(self.q_a_proj(hidden))), heads)
        shared = self.kv_a_proj_with_mqa(hidden)
        up = self.kv_b_proj.weight.view(heads, -1, rank)

        turned = _heads(rotate(query[..., nope:].flatten(2), rotation, heads), heads)
        absorbed = (query[..., :nope].transpose(1, 2) @ up[:, :nope]).transpose(1, 2)
        queries = torch.cat([absorbed, turned], 3).flatten(2)
        latent, key = self.kv_a_layernorm(shared[..., :rank]), rotate(shared[..., rank:], rotation, 1)
        rows = torch.cat([latent, key], 2)
        mixed, *present = sparse_attention(queries, rows, None, cache[0], None, past_length, spec=self.spec)
        values = _heads(mixed, heads).transpose(1, 2) @ up[:, nope:].transpose(1, 2)
        return self.o_proj(values.transpose(1, 2).flatten(2)), tuple(present)


def _heads(rows: Tensor, heads: int) -> Tensor:
    """(B, T, heads * D) to (B, T, heads, D)."""
    return rows.view(*rows.shape[:2], heads, -1)


class DecoderLayer(minicpm.DecoderLayer):
    def __init__(self, config: MiniCPM3Config, layer: int) -> None:
        super().__init__(config, layer)
        self.self_attn = LatentAttention(config, layer)


class Decoder(minicpm.Decoder):
    layer_class = DecoderLayer


class Model(minicpm.Model):
    decoder_class = Decoder
