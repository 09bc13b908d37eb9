"""A GGUF in Q4_0 from a random MiniCPM checkpoint, for llama.cpp's benchmark."""

from __future__ import annotations

import json
from pathlib import Path

import gguf
import numpy as np

from cpm_edge.exporter.checkpoint import open_checkpoint

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


def write_gguf(checkpoint: Path, file: Path) -> None:
    """Matrices in Q4_0, embedding (and tied head) in Q8_0 like ours, norms in F32; values do not matter."""
    config = json.loads((checkpoint / "config.json").read_text())
    writer = gguf.GGUFWriter(file, "minicpm")
    heads = config["num_attention_heads"]
    layers = config["num_hidden_layers"]
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_block_count(layers)
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_rope_dimension_count(config["hidden_size"] // heads)
    writer.add_head_count(heads)
    writer.add_head_count_kv(config["num_key_value_heads"])
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_embedding_scale(config["scale_emb"])
    writer.add_residual_scale(config["scale_depth"] / layers**0.5)
    writer.add_logit_scale(config["hidden_size"] / config["dim_model_base"])
    _add_tokenizer(writer, config["vocab_size"])
    with open_checkpoint(str(checkpoint)) as source:
        for name in source.tensors:
            data = source.read(name)
            if data.ndim == 1:
                writer.add_tensor(_gguf_name(name), data)
                continue
            kind = gguf.GGMLQuantizationType.Q4_0
            if name in _NAMES:
                kind = gguf.GGMLQuantizationType.Q8_0
            writer.add_tensor(_gguf_name(name), gguf.quants.quantize(data, kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _gguf_name(name: str) -> str:
    if name in _NAMES:
        return _NAMES[name]
    _, _, layer, rest = name.split(".", 3)
    return f"blk.{layer}.{_LAYER[rest.removesuffix('.weight')]}.weight"


def _add_tokenizer(writer: gguf.GGUFWriter, vocab_size: int) -> None:
    writer.add_tokenizer_model("llama")
    writer.add_token_list([f"<{number}>" for number in range(vocab_size)])
    writer.add_token_scores(np.zeros(vocab_size, np.float32).tolist())
    writer.add_token_types([1] * vocab_size)
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
