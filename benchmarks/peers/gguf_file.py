"""A GGUF from a random checkpoint, for llama.cpp's benchmark; only sizes and formats matter, not values."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import gguf
import numpy as np

from cpm_edge.benchmarks.errors import BenchError
from cpm_edge.exporter.checkpoint import open_checkpoint

# Linear layers; embedding and head are Q8_0 in both, as ours are int8.
FORMATS = {"Q4_0": gguf.GGMLQuantizationType.Q4_0, "TQ2_0": gguf.GGMLQuantizationType.TQ2_0}
_OUTER = gguf.GGMLQuantizationType.Q8_0
_ARCHITECTURES = {"MiniCPMForCausalLM": "minicpm", "LlamaForCausalLM": "llama"}
_NAMES = {
    "model.embed_tokens.weight": "token_embd.weight",
    "model.norm.weight": "output_norm.weight",
    "lm_head.weight": "output.weight",
}
_LAYER = {
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
}


def unsupported(config: dict[str, Any], format_: str) -> str | None:
    """Why llama.cpp cannot have this shape in this format, None when it can."""
    if not _ARCHITECTURES.keys() & set(config["architectures"]):
        return f"no GGUF writer for {config['architectures'][0]}"
    block, _ = gguf.GGML_QUANT_SIZES[FORMATS[format_]]
    heads = config["num_attention_heads"]
    wide = heads * config.get("head_dim", config["hidden_size"] // heads)
    for cols in (config["hidden_size"], config["intermediate_size"], wide):
        if cols % block:
            return f"{format_} packs {block} columns together, which does not divide {cols}"
    return None


def write_gguf(checkpoint: Path, file: Path, format_: str) -> None:
    """Linear layers in ``format_``, embedding and head in Q8_0, norms in F32, one tensor in memory at a time.

    Raises:
        BenchError: see ``unsupported``.
    """
    config = json.loads((checkpoint / "config.json").read_text(encoding="utf-8"))
    reason = unsupported(config, format_)
    if reason:
        raise BenchError(reason)
    writer = gguf.GGUFWriter(file, _architecture(config))
    _add_settings(writer, config)
    _add_tokenizer(writer, config["vocab_size"])
    with open_checkpoint(str(checkpoint)) as source:
        names = list(source.tensors)
        for name in names:
            shape, kind = tuple(source.tensors[name].shape), _kind(name, source.tensors[name].shape, format_)
            bytes_shape = gguf.quant_shape_to_byte_shape(shape, kind)
            plain = kind is gguf.GGMLQuantizationType.F32
            writer.add_tensor_info(
                gguf_name(name),
                shape if plain else bytes_shape,
                np.dtype(np.float32 if plain else np.uint8),
                int(np.prod(bytes_shape)),
                raw_dtype=kind,
            )
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        for name in names:
            data = source.read(name)
            writer.write_tensor_data(gguf.quants.quantize(data, _kind(name, data.shape, format_)))
    writer.close()


def gguf_name(name: str) -> str:
    """llama.cpp's name of a checkpoint tensor."""
    if name in _NAMES:
        return _NAMES[name]
    _, _, layer, rest = name.split(".", 3)
    return f"blk.{layer}.{_LAYER[rest.removesuffix('.weight')]}.weight"


def _kind(name: str, shape: Any, format_: str) -> gguf.GGMLQuantizationType:
    if len(shape) == 1:
        return gguf.GGMLQuantizationType.F32
    return _OUTER if name in _NAMES else FORMATS[format_]


def _architecture(config: dict[str, Any]) -> str:
    return next(_ARCHITECTURES[name] for name in config["architectures"] if name in _ARCHITECTURES)


def _add_settings(writer: gguf.GGUFWriter, config: dict[str, Any]) -> None:
    heads, layers, hidden = (
        config[key] for key in ("num_attention_heads", "num_hidden_layers", "hidden_size")
    )
    size = config.get("head_dim", hidden // heads)
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(hidden)
    writer.add_block_count(layers)
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_rope_dimension_count(size)
    writer.add_key_length(size)
    writer.add_value_length(size)
    writer.add_head_count(heads)
    writer.add_head_count_kv(config["num_key_value_heads"])
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    if _architecture(config) == "minicpm":
        writer.add_embedding_scale(config["scale_emb"])
        writer.add_residual_scale(config["scale_depth"] / layers**0.5)
        writer.add_logit_scale(hidden / config["dim_model_base"])


def _add_tokenizer(writer: gguf.GGUFWriter, vocab_size: int) -> None:
    writer.add_tokenizer_model("llama")
    writer.add_token_list([f"<{number}>" for number in range(vocab_size)])
    writer.add_token_scores(np.zeros(vocab_size, np.float32).tolist())
    writer.add_token_types([1] * vocab_size)
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
