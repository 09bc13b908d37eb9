"""MiniCPM-SALA configs: layers of sparse attention among layers of linear attention."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from cpm_edge.exporter.configs.llama import CacheShape
from cpm_edge.exporter.configs.minicpm import MiniCPMConfig, read_minicpm
from cpm_edge.exporter.configs.reader import ConfigReader
from cpm_edge.exporter.configs.rope import Rope
from cpm_edge.exporter.errors import ConfigError
from cpm_edge.plugins.linear_attention.spec import LinearAttentionSpec
from cpm_edge.runtimes.cache_layout import STATE

SPARSE, LIGHTNING = "minicpm4", "lightning-attn"

# What the released model computes; no other value has been seen, so none is guessed.
_ONLY: dict[str, Any] = {
    "attn_use_rope": False,
    "attn_use_output_gate": True,
    "lightning_use_rope": True,
    "lightning_scale": "1/sqrt(d)",
    "qk_norm": True,
    "use_output_norm": True,
    "use_output_gate": True,
}


@dataclass(frozen=True)
class MiniCPMSALAConfig(MiniCPMConfig):
    """MiniCPMConfig whose layers mix tokens in one of two ways.

    Sparse layers have a cache, no rotary embedding and an output gate. Lightning layers have normalized and
    rotated queries and keys, a state (heads, D, D) in place of a cache, and a normalized, gated output.

    Attributes:
        mixer_types: SPARSE or LIGHTNING, one a layer.
        lightning_nh: heads of the lightning layers, of queries, keys and values alike.
        lightning_head_dim: their size; what the rotary embedding is made for.
    """

    mixer_types: tuple[str, ...] = ()
    lightning_nh: int = 1
    lightning_head_dim: int = 2

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> MiniCPMSALAConfig:
        """Read a parsed config.json.

        Raises:
            ConfigError: a key is missing, malformed or asks for something not implemented.
        """
        reader = ConfigReader(data)
        reader.only("num_experts", (0,), 0)
        decoder = read_minicpm(reader)
        for key, value in _ONLY.items():
            reader.only(key, (value,))
        heads, size = _lightning_heads(reader), reader.positive("lightning_head_dim")
        if size % 2:
            raise ConfigError(f"lightning_head_dim: expected an even number, got {size}")
        decoder["rope"] = Rope.read(reader, size, decoder["max_position_embeddings"])
        mixers = _mixer_types(reader, decoder["num_hidden_layers"])
        config = cls(**decoder, mixer_types=mixers, lightning_nh=heads, lightning_head_dim=size)
        reader.finish(strict=False)
        config.attention_spec(0)
        return config

    def is_recurrent(self, layer: int) -> bool:
        return self.mixer_types[layer] == LIGHTNING

    def layer_kind(self, layer: int) -> str:
        return "lightning" if self.is_recurrent(layer) else "sparse"

    def layer_caches(self, layer: int) -> dict[str, CacheShape]:
        if self.is_recurrent(layer):
            return {STATE: (self.lightning_nh, self.lightning_head_dim, self.lightning_head_dim)}
        return super().layer_caches(layer)

    def linear_spec(self) -> LinearAttentionSpec:
        """Attributes of the linear attention of every lightning layer; ``attention_spec`` is of the others.

        The log decays fall geometrically, as ALiBi's slopes do: 2^(-8 (h + 1) / heads), equal in all layers.
        """
        heads = self.lightning_nh
        decay = tuple(-(2.0 ** (-8 * (head + 1) / heads)) for head in range(heads))
        return LinearAttentionSpec(decay, self.lightning_head_dim**-0.5)


def _lightning_heads(reader: ConfigReader) -> int:
    heads = reader.positive("lightning_nh")
    if heads & (heads - 1):
        raise ConfigError(
            f"lightning_nh: expected a power of two, got {heads}",
            hint="the decays of other head counts are not published",
        )
    reader.only("lightning_nkv", (heads,))
    return heads


def _mixer_types(reader: ConfigReader, layers: int) -> tuple[str, ...]:
    mixers = reader.get("mixer_types", list)
    if len(mixers) != layers:
        raise ConfigError(f"mixer_types: expected {layers} entries, one a layer, got {len(mixers)}")
    for layer, mixer in enumerate(mixers):
        if mixer not in (SPARSE, LIGHTNING):
            raise ConfigError(f"mixer_types[{layer}]: expected {SPARSE} or {LIGHTNING}, got {mixer!r}")
    if SPARSE not in mixers:
        raise ConfigError(f"mixer_types: expected at least one {SPARSE} layer, got none")
    return tuple(mixers)
