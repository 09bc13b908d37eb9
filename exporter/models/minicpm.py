"""MiniCPM: Llama with muP scales on the embeddings, the residual branches and the final hidden state."""

from __future__ import annotations

from torch import Tensor, nn

from cpm_edge.exporter.configs import MuPConfig
from cpm_edge.exporter.configs.rope import RopeTable
from cpm_edge.exporter.models import llama
from cpm_edge.exporter.models.llama import Cache, Rotation


class DecoderLayer(llama.DecoderLayer):
    def __init__(self, config: MuPConfig, layer: int) -> None:
        super().__init__(config, layer)
        self.residual_scale = config.residual_scale

    def forward(
        self, hidden: Tensor, rotation: Rotation, past_length: Tensor, cache: Cache
    ) -> tuple[Tensor, Cache]:
        attended, present = self.self_attn(self.input_layernorm(hidden), rotation, past_length, cache)
        hidden = hidden + attended * self.residual_scale
        fed = self.mlp(self.post_attention_layernorm(hidden))
        return hidden + fed * self.residual_scale, present


class Decoder(llama.Decoder):
    layer_class: type[nn.Module] = DecoderLayer


class Model(llama.Model):
    decoder_class = Decoder

    def __init__(self, config: MuPConfig, rope: RopeTable) -> None:
        super().__init__(config, rope)
        self.scale_emb = config.scale_emb
        self.logit_divisor = config.logit_divisor

    def embed(self, input_ids: Tensor, past_length: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        hidden, cos, sin = super().embed(input_ids, past_length)
        return hidden * self.scale_emb, cos, sin

    def head(self, hidden: Tensor) -> Tensor:
        return self.lm_head(self.model.norm(hidden) / self.logit_divisor)
