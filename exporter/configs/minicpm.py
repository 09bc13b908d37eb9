"""MiniCPM configs: 1B, 2B, 2B-128k, S-1B, 4 and 4.1 (muP scales, LongRoPE or dynamic NTK, InfLLM-V2)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from cpm_edge.exporter.configs.llama import LlamaConfig, read_decoder
from cpm_edge.exporter.configs.reader import ConfigReader
from cpm_edge.exporter.errors import ConfigError
from cpm_edge.plugins.sparse_attention.spec import SparseAttentionSpec


@dataclass(frozen=True)
class SparseConfig:
    """``sparse_config``: the published InfLLM-V2 settings are the defaults.

    ``dense_len`` -1 (always sparse) is stored as 0.
    """

    kernel_size: int = 32
    kernel_stride: int = 16
    init_blocks: int = 1
    block_size: int = 64
    window_size: int = 2048
    topk: int = 64
    dense_len: int = 8192
    coarse_lse: int = 1

    @classmethod
    def read(cls, reader: ConfigReader) -> SparseConfig:
        defaults = cls()
        reader.only("use_nope", (False,), False)
        dense_len = reader.get("dense_len", int, defaults.dense_len)
        if dense_len < -1:
            raise ConfigError(
                f"{reader.name('dense_len')}: expected -1 (always sparse) or a length, got {dense_len}"
            )
        config = cls(
            kernel_size=reader.positive("kernel_size", defaults.kernel_size),
            kernel_stride=reader.positive("kernel_stride", defaults.kernel_stride),
            init_blocks=reader.get("init_blocks", int, defaults.init_blocks),
            block_size=reader.positive("block_size", defaults.block_size),
            window_size=reader.positive("window_size", defaults.window_size),
            topk=reader.positive("topk", defaults.topk),
            dense_len=max(dense_len, 0),
            coarse_lse=reader.only("coarse_lse", (0, 1), defaults.coarse_lse),
        )
        reader.finish(strict=True)
        return config


@dataclass(frozen=True)
class MuPConfig(LlamaConfig):
    """LlamaConfig with the muP scales of the MiniCPM models.

    Attributes:
        scale_emb: factor on the embeddings.
        scale_depth: each residual branch is scaled by scale_depth / sqrt(num_hidden_layers).
        dim_model_base: the final hidden state is divided by hidden_size / dim_model_base.
    """

    scale_emb: float = 1.0
    scale_depth: float = 1.0
    dim_model_base: int = 1

    @property
    def residual_scale(self) -> float:
        return float(self.scale_depth / self.num_hidden_layers**0.5)

    @property
    def logit_divisor(self) -> float:
        return self.hidden_size / self.dim_model_base


@dataclass(frozen=True)
class MiniCPMConfig(MuPConfig):
    """MuPConfig with the optional sparse attention."""

    sparse_config: SparseConfig | None = None

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> MiniCPMConfig:
        """Read a parsed config.json.

        Raises:
            ConfigError: a key is missing, malformed or asks for something not implemented.
        """
        reader = ConfigReader(data)
        reader.only("num_experts", (0,), 0)
        config = cls(**read_minicpm(reader))
        reader.finish(strict=False)
        config.attention_spec(0)
        return config

    def with_attention(self, mode: str) -> MiniCPMConfig:
        """The config for ``--attention``: auto keeps it, dense drops ``sparse_config``, sparse needs one.

        The released MiniCPM4 and 4.1 configs lack ``sparse_config``; ``sparse`` puts the published one in.
        """
        if mode == "dense":
            return replace(self, sparse_config=None)
        if mode == "sparse" and self.sparse_config is None:
            return replace(self, sparse_config=SparseConfig())
        return self

    def attention_spec(self, layer: int) -> SparseAttentionSpec:
        heads, kv_heads, scale = self.num_attention_heads, self.num_key_value_heads, self.head_dim**-0.5
        if self.sparse_config is None:
            return SparseAttentionSpec.dense(heads, kv_heads, scale)
        try:
            return SparseAttentionSpec(heads, kv_heads, scale, **vars(self.sparse_config))
        except ValueError as error:
            raise ConfigError(f"sparse_config.{error}") from error


def read_minicpm(reader: ConfigReader) -> dict[str, Any]:
    """The keys of a MiniCPM decoder, checked."""
    decoder = read_decoder(reader, tied=True)
    sparse = reader.section("sparse_config")
    return {
        **decoder,
        "scale_emb": reader.positive_number("scale_emb", 1.0),
        "scale_depth": reader.positive_number("scale_depth", 1.0),
        "dim_model_base": reader.positive("dim_model_base", 1),
        "sparse_config": None if sparse is None else SparseConfig.read(sparse),
    }
