"""What a config.json says about sizes: the matrices of a model and what it keeps of every token.

Only sizes are read here; whether the exporter implements every value is its own question.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from cpm_edge.benchmarks.plan.errors import PlanError

LINEAR, EMBEDDING, HEAD, ABSORBED, EXPERT, NORM, OTHER = (
    "linear", "embedding", "head", "absorbed", "expert", "norm", "other",
)  # fmt: skip
LIGHTNING = "lightning-attn"
ARCHITECTURES = (
    "LlamaForCausalLM", "MiniCPMForCausalLM", "MiniCPM3ForCausalLM", "MiniCPMSALAForCausalLM",
)  # fmt: skip
_REQUIRED = ("hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size", "vocab_size")


@dataclass(frozen=True)
class Matrix:
    """``count`` equal tensors of one kind, (rows, cols) each.

    Attributes:
        kind: LINEAR, EMBEDDING, ...
        read: share of them that one token reads.
    """

    kind: str
    rows: int
    cols: int
    count: int
    read: float = 1.0

    @property
    def values(self) -> int:
        return self.rows * self.cols * self.count


@dataclass(frozen=True)
class Sparse:
    """InfLLM-V2's sizes, in tokens or blocks."""

    kernel_size: int = 32
    kernel_stride: int = 16
    block_size: int = 64
    window_size: int = 2048
    topk: int = 64
    dense_len: int = 8192

    @property
    def budget(self) -> int:
        """Blocks that a sparse query reads."""
        return self.topk + self.window_size // self.block_size


@dataclass(frozen=True)
class ModelShape:
    """Sizes of one model.

    Attributes:
        family: llama, minicpm, moe, latent or hybrid.
        cached: values that a layer with a cache keeps of a token: keys and values, or one latent row.
        cache_layers: how many layers have a cache; the others have a state.
        state: values of one recurrent layer's state, 0 without such layers.
        sparse: None where attention is dense.
        positions: the longest context the config allows.
    """

    family: str
    vocab_size: int
    hidden_size: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    intermediate_size: int
    tied: bool
    cached: int
    cache_layers: int
    state: int
    positions: int
    matrices: tuple[Matrix, ...] = field(repr=False)
    sparse: Sparse | None = None
    quantized: Mapping[str, Any] | None = None

    @classmethod
    def read(cls, source: Mapping[str, Any] | str | Path) -> ModelShape:
        """From a parsed config.json, its path, or the folder that it lies in.

        Raises:
            PlanError: not a config of an architecture with known sizes.
        """
        return _read(source if isinstance(source, Mapping) else _open(Path(source)))

    @property
    def is_latent(self) -> bool:
        return self.family == "latent"

    @property
    def state_layers(self) -> int:
        return self.layers - self.cache_layers

    @property
    def parameters(self) -> int:
        """Values of the checkpoint; a tied head is the embedding."""
        return sum(each.values for each in self.matrices if not (self.tied and each.kind == HEAD))

    def with_attention(self, mode: str) -> ModelShape:
        """For ``--attention``: auto keeps what the config says, dense and sparse change it.

        Raises:
            PlanError: sparse, and a family that was not trained for it.
        """
        if mode == "dense" and self.family != "hybrid":
            return replace(self, sparse=None)
        if mode == "sparse" and self.family not in ("minicpm", "hybrid"):
            raise PlanError(
                f"--attention sparse: expected an architecture trained for InfLLM-V2, got {self.family}",
                hint="leave --attention out",
            )
        return replace(self, sparse=self.sparse or Sparse()) if mode == "sparse" else self


def _open(path: Path) -> Mapping[str, Any]:
    file = path / "config.json" if path.is_dir() else path
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise PlanError(
            f"{file}: expected a config.json: {error}",
            hint="a plan needs the config alone: the folder of a checkpoint, or the file",
        ) from error
    if not isinstance(content, dict):
        raise PlanError(f"{file}: expected an object, got {type(content).__name__}")
    return content


def _read(config: Mapping[str, Any]) -> ModelShape:
    architectures = config.get("architectures") or ["nothing"]
    name = architectures[0] if isinstance(architectures, list) else architectures
    if name not in ARCHITECTURES:
        raise PlanError(
            f"architectures: expected one of {', '.join(ARCHITECTURES)}, got {name}",
            hint="see cpm-export --list-models",
        )
    sizes = {key: _whole(config, key) for key in _REQUIRED}
    if name == "MiniCPM3ForCausalLM":
        return _latent(config, sizes)
    if name == "MiniCPMSALAForCausalLM":
        return _hybrid(config, sizes)
    return _decoder(config, sizes, tied=name == "MiniCPMForCausalLM")


def _whole(config: Mapping[str, Any], key: str, default: int | None = None) -> int:
    value = config.get(key)
    if value is None and default is not None:
        return default
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise PlanError(
            f"{key}: expected a whole number above 0, got {value!r}", hint="config.json is damaged"
        )
    return value


def _base(config: Mapping[str, Any], sizes: Mapping[str, int], *, tied: bool) -> dict[str, Any]:
    heads = sizes["num_attention_heads"]
    quantized = config.get("quantization_config")
    return {
        "vocab_size": sizes["vocab_size"],
        "hidden_size": sizes["hidden_size"],
        "layers": sizes["num_hidden_layers"],
        "heads": heads,
        "kv_heads": _whole(config, "num_key_value_heads", heads),
        "head_dim": _whole(config, "head_dim", sizes["hidden_size"] // heads),
        "intermediate_size": sizes["intermediate_size"],
        "tied": bool(config.get("tie_word_embeddings", tied)),
        "positions": _positions(config),
        "quantized": quantized if isinstance(quantized, Mapping) else None,
    }


def _positions(config: Mapping[str, Any]) -> int:
    """The longest context; dynamic NTK scaling is made for ``factor`` times the positions."""
    positions = _whole(config, "max_position_embeddings")
    scaling = config.get("rope_scaling") or config.get("rope_parameters")
    if not isinstance(scaling, Mapping) or scaling.get("rope_type", scaling.get("type")) != "dynamic":
        return positions
    factor = scaling.get("factor")
    if isinstance(factor, bool) or not isinstance(factor, (int, float)) or not 0 < factor < 1e6:
        raise PlanError(f"rope_scaling.factor: expected a number above 0, got {factor!r}")
    return int(positions * factor)


def _outer(base: Mapping[str, Any]) -> tuple[Matrix, ...]:
    """Embedding, head and the last normalization."""
    vocab, hidden = base["vocab_size"], base["hidden_size"]
    return (
        Matrix(EMBEDDING, vocab, hidden, 1, 1 / vocab),
        Matrix(HEAD, vocab, hidden, 1),
        Matrix(NORM, 1, hidden, 1),
    )


def _mlp(hidden: int, inner: int, layers: int, kind: str = LINEAR, read: float = 1.0) -> tuple[Matrix, ...]:
    return (Matrix(kind, inner, hidden, 2 * layers, read), Matrix(kind, hidden, inner, layers, read))


def _attention(base: Mapping[str, Any], layers: int, *, gated: bool = False) -> tuple[Matrix, ...]:
    hidden, width = base["hidden_size"], base["heads"] * base["head_dim"]
    narrow = base["kv_heads"] * base["head_dim"]
    return (
        Matrix(LINEAR, width, hidden, layers * (2 if gated else 1)),
        Matrix(LINEAR, narrow, hidden, 2 * layers),
        Matrix(LINEAR, hidden, width, layers),
        Matrix(NORM, 2, hidden, layers),
    )


def _decoder(config: Mapping[str, Any], sizes: Mapping[str, int], *, tied: bool) -> ModelShape:
    base = _base(config, sizes, tied=tied)
    layers, hidden, inner = base["layers"], base["hidden_size"], base["intermediate_size"]
    experts = _whole(config, "num_experts", 1) if config.get("num_experts") else 0
    if experts:
        chosen = _whole(config, "num_experts_per_tok") / experts
        mlp = (
            *_mlp(hidden, inner, layers * experts, EXPERT, chosen),
            Matrix(OTHER, experts, hidden, layers),
        )
    else:
        mlp = _mlp(hidden, inner, layers)
    return ModelShape(
        family="moe" if experts else "minicpm" if tied else "llama",
        cached=2 * base["kv_heads"] * base["head_dim"],
        cache_layers=layers,
        state=0,
        matrices=(*_attention(base, layers), *mlp, *_outer(base)),
        sparse=_sparse(config) if tied else None,
        **base,
    )


def _sparse(config: Mapping[str, Any]) -> Sparse | None:
    section = config.get("sparse_config")
    if section is None:
        return None
    if not isinstance(section, Mapping):
        raise PlanError(f"sparse_config: expected an object, got {section!r}")
    default = Sparse()
    sizes = {key: section.get(key, getattr(default, key)) for key in Sparse.__dataclass_fields__}
    for key, value in sizes.items():
        least = -1 if key == "dense_len" else 0 if key in ("topk", "window_size") else 1
        if isinstance(value, bool) or not isinstance(value, int) or value < least:
            raise PlanError(f"sparse_config.{key}: expected a whole number from {least} on, got {value!r}")
    return Sparse(**{**sizes, "dense_len": max(0, sizes["dense_len"])})


def _latent(config: Mapping[str, Any], sizes: Mapping[str, int]) -> ModelShape:
    """Multi-head latent attention: one row of kv_lora_rank + qk_rope_head_dim a token and layer."""
    base = _base(config, sizes, tied=True)
    hidden, heads, layers = base["hidden_size"], base["heads"], base["layers"]
    nope, rope = _whole(config, "qk_nope_head_dim"), _whole(config, "qk_rope_head_dim")
    rank, query = _whole(config, "kv_lora_rank"), _whole(config, "q_lora_rank")
    value = _whole(config, "v_head_dim", hidden // heads)
    matrices = (
        Matrix(LINEAR, query, hidden, layers),
        Matrix(LINEAR, heads * (nope + rope), query, layers),
        Matrix(LINEAR, rank + rope, hidden, layers),
        Matrix(ABSORBED, heads * (nope + value), rank, layers),
        Matrix(LINEAR, hidden, heads * value, layers),
        Matrix(NORM, 1, 2 * hidden + query + rank, layers),
        *_mlp(hidden, base["intermediate_size"], layers),
        *_outer(base),
    )
    return ModelShape(
        **{**base, "kv_heads": 1, "head_dim": rank + rope},
        family="latent",
        cached=rank + rope,
        cache_layers=layers,
        state=0,
        matrices=matrices,
    )


def _hybrid(config: Mapping[str, Any], sizes: Mapping[str, int]) -> ModelShape:
    """Sparse layers with a cache, lightning layers with a state (heads, D, D)."""
    base = _base(config, sizes, tied=True)
    mixers = config.get("mixer_types")
    if not isinstance(mixers, list) or len(mixers) != base["layers"]:
        raise PlanError(f"mixer_types: expected {base['layers']} entries, one a layer, got {mixers!r}")
    lightning = sum(each == LIGHTNING for each in mixers)
    cached, hidden = base["layers"] - lightning, base["hidden_size"]
    heads, size = _whole(config, "lightning_nh"), _whole(config, "lightning_head_dim")
    width = heads * size
    matrices = (
        *_attention(base, cached, gated=True),
        Matrix(LINEAR, width, hidden, 4 * lightning),
        Matrix(LINEAR, hidden, width, lightning),
        Matrix(NORM, 1, 2 * hidden + width + 2 * size, lightning),
        *_mlp(hidden, base["intermediate_size"], base["layers"]),
        *_outer(base),
    )
    return ModelShape(
        family="hybrid",
        cached=2 * base["kv_heads"] * base["head_dim"],
        cache_layers=cached,
        state=heads * size * size,
        matrices=matrices,
        sparse=_sparse(config),
        **base,
    )
