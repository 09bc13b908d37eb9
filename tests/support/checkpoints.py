"""Seeded checkpoints of a few thousand weights, one for each variant of the architectures.

Every scale differs from 1, and the weights are sized so that nothing is degenerate: logits have a standard
deviation of about 3, attention scores of about 1.7, and every residual branch weighs as much as its stream.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from itertools import cycle
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import numpy.typing as npt
from safetensors.numpy import save_file

from tests.runtimes.fakes import CHATML, byte_level_tokenizer
from tests.support.gguf_file import GGUFS, Blocks, blocks_of
from tests.support.mlps import experts_config, fatrelu_config, mlp_tensors
from tests.support.packed import LATENT_PACKINGS, PACKINGS, Int4, pack, quantized
from tests.support.qat import QATS, in_bfloat16, trained
from tests.support.sala import LIGHTNING, mixer_config, mixer_tensors
from tests.support.sala import SPARSE as SPARSE_MIXER

Tensors = dict[str, npt.NDArray[np.float32]]
Config = dict[str, Any]

VOCAB = 320
LOGIT_STD = 3.0

_COMMON: Config = {
    "vocab_size": VOCAB,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "hidden_act": "silu",
    "rms_norm_eps": 1e-5,
    "max_position_embeddings": 1024,
    "bos_token_id": 0,
    "eos_token_id": 1,
}
_MINICPM: Config = {
    **_COMMON,
    "architectures": ["MiniCPMForCausalLM"],
    "model_type": "minicpm",
    "tie_word_embeddings": False,
    "scale_emb": 1.5,
    "scale_depth": 1.2,
    "dim_model_base": 24,
}
_SPARSE: Config = {
    "kernel_size": 8,
    "kernel_stride": 4,
    "init_blocks": 1,
    "block_size": 16,
    "window_size": 32,
    "topk": 3,
    "dense_len": 64,
}
_HALF = 8  # of the head size 16: LongRoPE factors a list
# No two of its sizes are equal, and the value heads are not hidden_size / heads.
_MINICPM3: Config = {
    **_MINICPM,
    "architectures": ["MiniCPM3ForCausalLM"],
    "model_type": "minicpm3",
    "num_key_value_heads": 4,
    "q_lora_rank": 32,
    "kv_lora_rank": 48,
    "qk_nope_head_dim": 10,
    "qk_rope_head_dim": 8,
    "v_head_dim": 32,
}

VARIANTS: dict[str, Config] = {
    # head_dim is not hidden_size / heads; three layers of one kind.
    "llama": {
        **_COMMON,
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "num_hidden_layers": 3,
        "head_dim": 32,
        "rope_theta": 5e5,
        "tie_word_embeddings": False,
    },
    "tied-mha": {**_MINICPM, "num_key_value_heads": 4, "tie_word_embeddings": True},
    # max_position_embeddings is above the original, so the long list and its attention factor apply.
    "longrope": {
        **_MINICPM,
        "rope_scaling": {
            "rope_type": "longrope",
            "short_factor": [round(1 + 0.03 * i, 3) for i in range(_HALF)],
            "long_factor": [round(1.1 + 0.9 * i, 3) for i in range(_HALF)],
            "original_max_position_embeddings": 256,
        },
    },
    "dynamic-ntk": {
        **_MINICPM,
        "max_position_embeddings": 256,
        "rope_theta": 2e4,
        "rope_scaling": {"type": "dynamic", "factor": 4.0},
    },
    "sparse": {**_MINICPM, "sparse_config": {**_SPARSE, "coarse_lse": 1}},
    "sparse-exact": {**_MINICPM, "sparse_config": {**_SPARSE, "coarse_lse": 0}},
    "minicpm3": {
        **_MINICPM3,
        "tie_word_embeddings": True,
        "rope_scaling": {
            "type": "longrope",
            "short_factor": [1.0, 1.1, 1.3, 1.6],
            "long_factor": [1.2, 2.0, 3.1, 4.5],
            "original_max_position_embeddings": 256,
        },
    },
    "minicpm3-untied": _MINICPM3,
    # Three query heads share a kv head, and the heads are wider than hidden_size / heads.
    "sparse-group3": {
        **_MINICPM,
        "num_attention_heads": 6,
        "head_dim": 16,
        "sparse_config": {**_SPARSE, "coarse_lse": 1},
    },
    "moe": {**_MINICPM, **experts_config(8, 2), "num_key_value_heads": 4},
    "moe-sparse": {**_MINICPM, **experts_config(5, 3), "sparse_config": {**_SPARSE, "coarse_lse": 1}},
    "fatrelu": {**_MINICPM, **fatrelu_config(1.25), "tie_word_embeddings": True},
    # The first layer has no cache; heads of both kinds of layers differ in number and size.
    "sala": {
        **_MINICPM,
        **mixer_config([LIGHTNING, SPARSE_MIXER, LIGHTNING, SPARSE_MIXER], heads=4, size=24),
        "sparse_config": {**_SPARSE, "coarse_lse": 1},
    },
    "sala-dense": {
        **_MINICPM,
        **mixer_config([SPARSE_MIXER, LIGHTNING, LIGHTNING], heads=8, size=16),
        "tie_word_embeddings": True,
    },
}

# Variants whose linear layers are ternary, by the group sizes that their tensors have in turn; 0 is the row.
# Their scales are bfloat16, but for those of TERNARY_WIDE, which float16 does not hold.
TERNARY_WIDE = "ternary-wide"
TERNARY: dict[str, tuple[int, ...]] = {
    "ternary": (128,),
    "ternary-row": (0,),
    "ternary-256": (256,),
    "ternary-64": (64,),
    "ternary-mixed": (0, 256, 128, 64, 32),
    "ternary-llama": (128,),
}
# Experts with groups of every size; the router is not ternary.
TERNARY_EXPERTS = "ternary-moe"
_WIDE: Config = {**_MINICPM, "hidden_size": 256, "intermediate_size": 512, "dim_model_base": 96}
# The search for the grid of small groups tries the larger ones first, which takes seconds in a _WIDE model.
_NARROW: Config = {**_MINICPM, "hidden_size": 128, "intermediate_size": 256, "dim_model_base": 48}
# BitCPM-CANN 1B and 3B: no muP, LongRoPE, heads that are not hidden_size / heads wide.
_WIDE_LLAMA: Config = {
    **VARIANTS["llama"],
    "num_hidden_layers": 2,
    "hidden_size": 256,
    "intermediate_size": 512,
    "rope_scaling": {
        "rope_type": "longrope",
        "short_factor": [round(1 + 0.03 * i, 3) for i in range(16)],
        "long_factor": [round(1.1 + 0.9 * i, 3) for i in range(16)],
        "original_max_position_embeddings": 1024,
    },
}
# Whole groups and words of eight in every matrix.
_LATENT_WIDE: Config = {**_MINICPM3, "kv_lora_rank": 96, "qk_nope_head_dim": 16}


_LLAMA_WIDE: Config = {
    **_COMMON,
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 256,
    "intermediate_size": 512,
    "tie_word_embeddings": False,
}
# The original context is not written into files; readers take the whole.
_LATENT_GGUF: Config = {
    **_LATENT_WIDE,
    "rope_scaling": {
        **VARIANTS["minicpm3"]["rope_scaling"],
        "original_max_position_embeddings": _LATENT_WIDE["max_position_embeddings"],
    },
}


_PACKED = PACKINGS | LATENT_PACKINGS


def _packed_config(variant: str) -> Config:
    """Without ``quantization_config``."""
    return _LATENT_WIDE if variant in LATENT_PACKINGS else _WIDE


def _gguf_config(variant: str) -> Config:
    return {"llama": _LLAMA_WIDE, "minicpm3": _LATENT_GGUF}.get(variant.split("-")[0], _WIDE)


def _trained_config(variant: str) -> Config:
    return _WIDE if QATS[variant].group == 128 else _NARROW


def config_of(variant: str) -> Config:
    if variant in GGUFS:
        return _gguf_config(variant)
    if variant in QATS:
        return _trained_config(variant)
    if variant in _PACKED:
        return _packed_config(variant) | {"quantization_config": _PACKED[variant].config()}
    if variant == TERNARY_EXPERTS:
        return _WIDE | experts_config(4, 2)
    if variant == "ternary-llama":
        return _WIDE_LLAMA
    return _WIDE if variant in (*TERNARY, TERNARY_WIDE) else VARIANTS[variant]


def tensors_of(variant: str) -> Tensors:
    """The weights of a variant; equal from call to call."""
    if variant in _PACKED:
        matrices = {name: matrix.weight() for name, matrix in packed_of(variant).items()}
        return make_tensors(_packed_config(variant)) | matrices
    if variant in GGUFS:
        return gguf_sources(variant) | {name: b.weight() for name, b in gguf_of(variant).items()}
    if variant in QATS:
        rounded = {n: in_bfloat16(matrix).astype(np.float32) for n, matrix in trained_of(variant).items()}
        return make_tensors(_trained_config(variant)) | rounded
    tensors = make_tensors(config_of(variant))
    groups = cycle(TERNARY.get("ternary-mixed" if variant == TERNARY_EXPERTS else variant, (128,)))
    if variant in (*TERNARY, TERNARY_WIDE, TERNARY_EXPERTS):
        for name in linear_names(tensors):
            tensors[name] = fake_quantized(tensors[name], next(groups), wide=variant == TERNARY_WIDE)
    return tensors


def packed_of(variant: str) -> dict[str, Int4]:
    """The quantized matrices of a packed variant, by the names of their weights."""
    packing, tensors, matrices = _PACKED[variant], make_tensors(_packed_config(variant)), {}
    for name in linear_names(tensors):
        if name.split(".")[-2] not in packing.floats:
            # What reads the same activations has the same column order, as calibration gives it.
            inputs = {"q_proj": 0, "k_proj": 0, "v_proj": 0, "o_proj": 1, "down_proj": 3}
            inputs |= {"q_a_proj": 0, "kv_a_proj_with_mqa": 0, "q_b_proj": 4, "kv_b_proj": 5}
            matrices[name] = quantized(tensors[name], packing, inputs.get(name.split(".")[-2], 2))
    return matrices


def trained_of(variant: str) -> dict[str, Int4]:
    """The matrices that a variant of QATS was trained to have, by name."""
    training, tensors = QATS[variant], make_tensors(_trained_config(variant))
    names = [name for name in linear_names(tensors) if name.split(".")[-2] not in training.floats]
    return {name: trained(tensors[name], training) for name in names}


def gguf_sources(variant: str) -> Tensors:
    """The weights that a variant of GGUFS was quantized from."""
    tensors = make_tensors(_gguf_config(variant))
    if GGUFS[variant][0].startswith("TQ"):
        tensors |= {name: fake_quantized(tensors[name], 256) for name in linear_names(tensors)}
    return tensors


def gguf_of(variant: str) -> dict[str, Blocks]:
    """The matrices of a variant of GGUFS, by name."""
    return blocks_of(variant, gguf_sources(variant))


def stored_of(variant: str) -> dict[str, npt.NDArray[Any]]:
    """What the weight file of a variant holds."""
    if variant in QATS:
        rounded = {name: in_bfloat16(matrix) for name, matrix in trained_of(variant).items()}
        return make_tensors(_trained_config(variant)) | rounded
    if variant not in _PACKED:
        return dict(tensors_of(variant))
    matrices = packed_of(variant)
    stored: dict[str, npt.NDArray[Any]] = {}
    for name, tensor in make_tensors(_packed_config(variant)).items():
        if name in matrices:
            stored |= pack(name.removesuffix(".weight"), matrices[name], _PACKED[variant])
        else:
            stored[name] = tensor
    return stored


def linear_names(tensors: Tensors) -> list[str]:
    """The matrices of the layers: what ternary models quantize."""
    return [
        name
        for name, tensor in tensors.items()
        if ".layers." in name and tensor.ndim == 2 and not name.endswith(".mlp.gate.weight")
    ]


def fake_quantized(
    weight: npt.NDArray[np.float32], group: int, *, wide: bool = False
) -> npt.NDArray[np.float32]:
    """-s, 0 and s as training leaves them: s is the mean magnitude of a group (0: of a row), in bfloat16."""
    groups = weight.reshape(len(weight), -1, group or weight.shape[1])
    scale = np.abs(groups).mean(axis=2, keepdims=True)
    scale = scale if wide else scale.astype(ml_dtypes.bfloat16).astype(np.float32)
    # The sign of a zero stays, as it does in a checkpoint.
    return np.asarray(np.clip(np.rint(groups / scale), -1, 1) * scale).reshape(weight.shape)


def head_size(config: Config) -> int:
    return int(config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"])


def make_tensors(config: Config, seed: int = 0) -> Tensors:
    """Random weights for a config, float32, by checkpoint name."""
    rng = np.random.default_rng(seed)
    hidden = config["hidden_size"]
    tied = config["tie_word_embeddings"]
    divisor = hidden / config["dim_model_base"] if "dim_model_base" in config else 1.0

    def matrix(rows: int, cols: int, gain: float) -> npt.NDArray[np.float32]:
        return np.asarray(rng.standard_normal((rows, cols)) * (gain / cols**0.5), np.float32)

    def norm(size: int = hidden) -> npt.NDArray[np.float32]:
        return np.asarray(1 + 0.2 * rng.standard_normal(size), np.float32)

    head_gain = LOGIT_STD * divisor
    embedding_gain = head_gain if tied else 0.8 * hidden**0.5
    attention = _latent_attention if "kv_lora_rank" in config else _attention
    result = {"model.embed_tokens.weight": matrix(config["vocab_size"], hidden, embedding_gain)}
    for layer in range(config["num_hidden_layers"]):
        prefix = f"model.layers.{layer}."
        result[prefix + "input_layernorm.weight"] = norm()
        own = {f"{prefix}self_attn.{name}.weight": shape for name, shape in attention(config).items()}
        result |= {name: matrix(*shape) if len(shape) > 1 else norm(*shape) for name, shape in own.items()}
        result |= {
            prefix + "post_attention_layernorm.weight": norm(),
        }
        result |= {f"{prefix}mlp.{name}": tensor for name, tensor in mlp_tensors(config, matrix).items()}
        if "mixer_types" in config:
            mixer = mixer_tensors(config, layer, matrix, norm)
            result |= {prefix + name: tensor for name, tensor in mixer.items()}
    result["model.norm.weight"] = norm()
    if not tied:
        result["lm_head.weight"] = matrix(config["vocab_size"], hidden, head_gain)
    return result


def _attention(config: Config) -> dict[str, tuple[Any, ...]]:
    """Rows, columns and gain of the matrices."""
    hidden, size = config["hidden_size"], head_size(config)
    heads, kv_heads = config["num_attention_heads"], config["num_key_value_heads"]
    return {
        "q_proj": (heads * size, hidden, 1.3),
        "k_proj": (kv_heads * size, hidden, 1.3),
        "v_proj": (kv_heads * size, hidden, 1.5),
        "o_proj": (hidden, heads * size, 3.0),
    }


def _latent_attention(config: Config) -> dict[str, tuple[Any, ...]]:
    """As ``_attention``; the weights of normalizations have only rows."""
    hidden, heads = config["hidden_size"], config["num_attention_heads"]
    queries, latent = config["q_lora_rank"], config["kv_lora_rank"]
    plain, turning, value = (config[f"{name}_head_dim"] for name in ("qk_nope", "qk_rope", "v"))
    return {
        "q_a_proj": (queries, hidden, 1.0),
        "q_a_layernorm": (queries,),
        "q_b_proj": (heads * (plain + turning), queries, 1.3),
        "kv_a_proj_with_mqa": (latent + turning, hidden, 1.3),
        "kv_a_layernorm": (latent,),
        "kv_b_proj": (heads * (plain + value), latent, 1.5),
        "o_proj": (hidden, heads * value, 3.0),
    }


def write_checkpoint(folder: Path, config: Config, tensors: Mapping[str, npt.NDArray[Any]]) -> Path:
    """A folder that the exporter opens: weights, config and a byte-level tokenizer with a chat template."""
    folder.mkdir(parents=True, exist_ok=True)
    save_file(dict(tensors), folder / "model.safetensors")
    byte_level_tokenizer().save(str(folder / "tokenizer.json"))
    texts: dict[str, Any] = {
        "config.json": config,
        "generation_config.json": {"eos_token_id": [1]},
        "tokenizer_config.json": {"bos_token": "<s>", "eos_token": "</s>", "chat_template": CHATML},
    }
    for name, value in texts.items():
        (folder / name).write_text(json.dumps(value), encoding="utf-8")
    return folder


def prompt(length: int, seed: int = 1) -> npt.NDArray[np.int64]:
    """Token ids (length,) in which a passage comes back, as text does: some attention peaks, some ties."""
    rng = np.random.default_rng(seed)
    ids = rng.integers(0, VOCAB, length)
    passage = min(24, length // 4)
    ids[-passage:] = ids[length // 3 : length // 3 + passage]
    return ids
