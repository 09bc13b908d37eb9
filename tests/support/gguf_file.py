"""GGUF files of tiny models, their blocks put together from the statement of the formats.

Nothing here uses the reader; K-quants, which Python cannot write, are random blocks.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gguf
import ml_dtypes
import numpy as np
import numpy.typing as npt
from gguf import GGMLQuantizationType as Type

from tests.runtimes.fakes import CHATML, byte_level_tokenizer
from tests.support.packed import Int4, Packing, quantized

Bytes = npt.NDArray[np.uint8]
Weight = npt.NDArray[np.float32]

NAMES = {
    "model.embed_tokens": "token_embd",
    "model.norm": "output_norm",
    "lm_head": "output",
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "self_attn.q_a_proj": "attn_q_a",
    "self_attn.q_a_layernorm": "attn_q_a_norm",
    "self_attn.q_b_proj": "attn_q_b",
    "self_attn.kv_a_proj_with_mqa": "attn_kv_a_mqa",
    "self_attn.kv_a_layernorm": "attn_kv_a_norm",
    "self_attn.kv_b_proj": "attn_kv_b",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}


@dataclass(frozen=True)
class Blocks:
    """A matrix as stored.

    Attributes:
        kind: GGUF type.
        rows: bytes (rows, bytes of a row).
        integers: what they hold, where bundles have an equal.
    """

    kind: Type
    rows: Bytes
    integers: Int4 | None = None

    def weight(self) -> Weight:
        if self.integers is not None:
            return self.integers.weight()
        return np.asarray(gguf.quants.dequantize(self.rows, self.kind), np.float32)


def store(weight: Weight, kind: str, seed: int) -> Blocks:
    """A matrix in blocks of a type; ``Q4_1 zeros`` has minima that are whole multiples of the scales."""
    if kind == "Q4_0":
        matrix = quantized(weight, Packing("", 32), 0)
        return Blocks(Type.Q4_0, _join(matrix, [matrix.scales], _halves(matrix.codes)), matrix)
    if kind == "Q4_1 zeros":
        # float16 holds the multiples of scales that have few bits themselves.
        packing = Packing("", 32, symmetric=False, scale_type=ml_dtypes.float8_e5m2)
        matrix = quantized(weight, packing, 0)
        least = -matrix.zeros.astype(np.float32) * matrix.scales
        return Blocks(Type.Q4_1, _join(matrix, [matrix.scales, least], _halves(matrix.codes)), matrix)
    if kind == "Q8_0":
        groups = weight.reshape(len(weight), -1, 32)
        scales = (np.abs(groups).max(axis=2) / 127).astype(np.float16).astype(np.float32)
        signed = np.clip(np.rint(groups / scales[:, :, None]), -127, 127).astype(np.int8)
        codes = (signed.reshape(weight.shape).astype(np.int16) + 128).astype(np.uint8)
        g_idx = np.arange(weight.shape[1], dtype=np.int32) // 32
        matrix = Int4(codes, np.full(scales.shape, 128, np.uint8), scales, g_idx)
        return Blocks(Type.Q8_0, _join(matrix, [scales], signed.view(np.uint8)), matrix)
    if kind in ("Q4_K", "Q6_K"):
        return _random_blocks(weight, Type[kind], seed)
    return Blocks(Type[kind], gguf.quants.quantize(weight, Type[kind]))


def _halves(codes: Bytes) -> Bytes:
    """(rows, blocks, 16) bytes: column i of 32 in the lower half of byte i, column i + 16 in the upper."""
    blocks = codes.reshape(len(codes), -1, 32)
    return blocks[:, :, :16] | blocks[:, :, 16:] << np.uint8(4)


def _join(matrix: Int4, numbers: list[Weight], codes: Bytes) -> Bytes:
    parts = [np.ascontiguousarray(values.astype(np.float16)[:, :, None]).view(np.uint8) for values in numbers]
    return np.concatenate([*parts, codes], axis=2).reshape(len(matrix.codes), -1)


def _random_blocks(weight: Weight, kind: Type, seed: int) -> Blocks:
    """Blocks of random codes whose weights spread like those of ``weight``."""
    block, size = gguf.GGML_QUANT_SIZES[kind]
    rng = np.random.default_rng(seed)
    rows = rng.integers(0, 256, (len(weight), weight.shape[1] // block, size)).astype(np.uint8)
    places = (0, 2) if kind is Type.Q4_K else (208,)

    def scaled(value: float) -> Blocks:
        for place in places:
            # With half of its scale as minimum, Q4_K's 0..15 lies around 0.
            factor = value * (7.5 if place == 2 else 1)
            rows[:, :, place : place + 2] = np.frombuffer(np.float16(factor).tobytes(), np.uint8)
        return Blocks(kind, rows.reshape(len(weight), -1))

    return scaled(1e-3 * float(weight.std() / scaled(1e-3).weight().std()))


# Of other architectures, by their prefix. K-quants would want multiples of 256 columns in the latents.
OTHER_GGUFS: dict[str, tuple[str, dict[str, str]]] = {
    "llama-gguf-q4_0": ("Q4_0", {"embed_tokens": "F16", "lm_head": "Q8_0"}),
    "minicpm3-gguf-q4_0": ("Q4_0", {"embed_tokens": "F16", "lm_head": "F16"}),
    "minicpm3-gguf-q8_0": ("Q8_0", {}),
    "minicpm3-gguf-q4_1": ("Q4_1", {}),
}
# Types of the matrices by the name of the variant: of all, and of some by the last part of their name.
GGUFS: dict[str, tuple[str, dict[str, str]]] = {
    "gguf-q4_0": ("Q4_0", {"embed_tokens": "Q8_0", "lm_head": "Q8_0"}),
    "gguf-q4_1": ("Q4_1", {}),
    "gguf-q4_1-zeros": ("Q4_1 zeros", {"embed_tokens": "F16", "lm_head": "F16"}),
    "gguf-q8_0": ("Q8_0", {}),
    "gguf-mixed": ("Q4_0", {"v_proj": "Q6_K", "down_proj": "Q8_0", "embed_tokens": "F16", "lm_head": "Q6_K"}),
    "gguf-q4_k": ("Q4_K", {"v_proj": "Q6_K", "lm_head": "Q6_K"}),
    "gguf-f16": ("F16", {}),
    "gguf-bf16": ("BF16", {}),
    "gguf-tq1_0": ("TQ1_0", {"embed_tokens": "Q4_K", "lm_head": "Q6_K"}),
    "gguf-tq2_0": ("TQ2_0", {"embed_tokens": "Q4_K", "lm_head": "Q6_K"}),
} | OTHER_GGUFS


def blocks_of(variant: str, tensors: Mapping[str, Weight]) -> dict[str, Blocks]:
    """The matrices of a variant as stored, by Hugging Face name and in its row order."""
    usual, others = GGUFS[variant]
    matrices = {}
    for seed, (name, tensor) in enumerate(tensors.items()):
        if tensor.ndim == 2:
            matrices[name] = store(tensor, others.get(name.split(".")[-2], usual), seed)
    return matrices


def write(
    path: Path, config: Mapping[str, Any], tensors: Mapping[str, Weight], blocks: dict[str, Blocks]
) -> Path:
    """A GGUF file as llama.cpp's converter writes it, with a tokenizer beside it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    writer = gguf.GGUFWriter(path, config["model_type"])
    _add_settings(writer, config)
    for name, tensor in tensors.items():
        heads = {"q_proj": "num_attention_heads", "k_proj": "num_key_value_heads"}.get(name.split(".")[-2])
        if name in blocks:
            rows = blocks[name].rows if heads is None else interleaved(blocks[name].rows, config[heads])
            writer.add_tensor(gguf_name(name), rows, raw_dtype=blocks[name].kind)
        else:
            writer.add_tensor(gguf_name(name), tensor)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    byte_level_tokenizer().save(str(path.parent / "tokenizer.json"))
    (path.parent / "chat_template.jinja").write_text(CHATML)
    return path


def interleaved(rows: Bytes, heads: int) -> Bytes:
    """llama.cpp's order of query and key rows: the two halves of each head take turns."""
    halves = rows.reshape(heads, 2, len(rows) // heads // 2, -1)
    return np.ascontiguousarray(halves.transpose(0, 2, 1, 3).reshape(rows.shape))


def gguf_name(name: str) -> str:
    stem, kind = name.rsplit(".", 1)
    if stem in NAMES:
        return f"{NAMES[stem]}.{kind}"
    _, _, layer, part = stem.split(".", 3)
    return f"blk.{layer}.{NAMES[part]}.{kind}"


def _add_settings(writer: gguf.GGUFWriter, config: Mapping[str, Any]) -> None:
    hidden = config["hidden_size"]
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(hidden)
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(config["num_attention_heads"])
    writer.add_head_count_kv(config["num_key_value_heads"])
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    if "scale_emb" in config:
        writer.add_embedding_scale(config["scale_emb"])
        writer.add_residual_scale(config["scale_depth"] / config["num_hidden_layers"] ** 0.5)
        writer.add_logit_scale(hidden / config["dim_model_base"])
    if "kv_lora_rank" in config:
        writer.add_q_lora_rank(config["q_lora_rank"])
        writer.add_kv_lora_rank(config["kv_lora_rank"])
        writer.add_key_length(config["qk_nope_head_dim"] + config["qk_rope_head_dim"])
        writer.add_rope_dimension_count(config["qk_rope_head_dim"])
    else:
        writer.add_rope_dimension_count(hidden // config["num_attention_heads"])
    for kind in ("long", "short") if config.get("rope_scaling") else ():
        factors = np.array(config["rope_scaling"][f"{kind}_factor"], np.float32)
        writer.add_tensor(f"rope_factors_{kind}.weight", factors)
    vocabulary = sorted(byte_level_tokenizer().get_vocab().items(), key=lambda entry: entry[1])
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list([token for token, _ in vocabulary])
    writer.add_bos_token_id(config["bos_token_id"])
    writer.add_eos_token_id(config["eos_token_id"])
