"""MiniCPM-MoE configs: MiniCPM whose MLPs are several, of which a router chooses a few for every token."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from cpm_edge.exporter.configs.minicpm import MiniCPMConfig, read_minicpm
from cpm_edge.exporter.configs.reader import ConfigReader
from cpm_edge.exporter.errors import ConfigError
from cpm_edge.plugins.mixture_of_experts.spec import MixtureOfExpertsSpec

# What the released model computes, where other families have a choice.
_ONLY: dict[str, Any] = {
    "hidden_act": "silu",
    "norm_topk_prob": True,
    "scoring_func": "softmax",
    "num_shared_experts": 0,
    "n_shared_experts": 0,
}


@dataclass(frozen=True)
class MiniCPMMoEConfig(MiniCPMConfig):
    """MiniCPMConfig with experts.

    Attributes:
        num_experts: MLPs of intermediate_size a layer.
        num_experts_per_tok: how many of them each token passes through.
    """

    num_experts: int = 1
    num_experts_per_tok: int = 1

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> MiniCPMMoEConfig:
        """Read a parsed config.json.

        Raises:
            ConfigError: a key is missing, malformed or asks for something not implemented.
        """
        reader = ConfigReader(data)
        decoder = read_minicpm(reader)
        for key, value in _ONLY.items():
            reader.only(key, (value,), value)
        experts, chosen = reader.positive("num_experts"), reader.positive("num_experts_per_tok")
        if chosen > experts:
            raise ConfigError(f"num_experts_per_tok: expected at most num_experts ({experts}), got {chosen}")
        config = cls(**decoder, num_experts=experts, num_experts_per_tok=chosen)
        reader.finish(strict=False)
        config.attention_spec(0)
        return config

    @property
    def makes_choices(self) -> bool:
        return self.num_experts_per_tok < self.num_experts

    def experts_spec(self) -> MixtureOfExpertsSpec:
        """Attributes of the op of every layer."""
        return MixtureOfExpertsSpec(self.num_experts, self.num_experts_per_tok)
