"""MiniCPM-MoE: MiniCPM with several MLPs a layer, and a router that chooses among them for every token."""

from __future__ import annotations

from torch import Tensor, nn

from cpm_edge.exporter.configs import MiniCPMMoEConfig
from cpm_edge.exporter.models import minicpm
from cpm_edge.exporter.ops.mixture_of_experts import mixture_of_experts


class Expert(nn.Module):
    """The weights of one gated MLP: w2 (silu(w1 x) * w3 x)."""

    def __init__(self, config: MiniCPMMoEConfig) -> None:
        super().__init__()
        hidden, wide = config.hidden_size, config.intermediate_size
        self.w1 = nn.Linear(hidden, wide, bias=False)
        self.w3 = nn.Linear(hidden, wide, bias=False)
        self.w2 = nn.Linear(wide, hidden, bias=False)


class Experts(nn.Module):
    def __init__(self, config: MiniCPMMoEConfig) -> None:
        super().__init__()
        self.spec = config.experts_spec()
        self.gate = nn.Linear(config.hidden_size, config.num_experts, bias=False)
        self.experts = nn.ModuleList(Expert(config) for _ in range(config.num_experts))

    def forward(self, hidden: Tensor) -> Tensor:
        w1, w3, w2 = (
            [expert.get_submodule(name).weight for expert in self.experts] for name in ("w1", "w3", "w2")
        )
        return mixture_of_experts(hidden, self.gate(hidden), w1, w3, w2, spec=self.spec)  # type: ignore[arg-type]


class DecoderLayer(minicpm.DecoderLayer):
    mlp_class = Experts


class Decoder(minicpm.Decoder):
    layer_class = DecoderLayer


class Model(minicpm.Model):
    decoder_class = Decoder
