"""GGUF tensor names as Hugging Face names, and the row order of GGUF's query and key weights.

llama.cpp's converter reorders them for the architectures llama and minicpm; minicpm3 keeps its order.
"""

from __future__ import annotations

import re
from collections.abc import Iterable

import numpy as np
import numpy.typing as npt

from cpm_edge.exporter.errors import CheckpointError

ROPE_LONG = "rope_factors_long.weight"
ROPE_SHORT = "rope_factors_short.weight"
ROPE_FREQS = "rope_freqs.weight"
ROPE_TENSORS = {ROPE_LONG, ROPE_SHORT, ROPE_FREQS}  # parameters, which go into the config
TOP_LEVEL = {
    "token_embd.weight": "model.embed_tokens.weight",
    "output_norm.weight": "model.norm.weight",
    "output.weight": "lm_head.weight",
}
IN_LAYER = {
    "attn_norm": "input_layernorm",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
# MiniCPM3's latent attention, in place of q, k and v.
LATENT = {
    "attn_q_a": "self_attn.q_a_proj",
    "attn_q_a_norm": "self_attn.q_a_layernorm",
    "attn_q_b": "self_attn.q_b_proj",
    "attn_kv_a_mqa": "self_attn.kv_a_proj_with_mqa",
    "attn_kv_a_norm": "self_attn.kv_a_layernorm",
    "attn_kv_b": "self_attn.kv_b_proj",
}
DENSE = {
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
}
LAYER = re.compile(r"blk\.(\d+)\.(\w+)\.(weight|bias)")


def hf_names(gguf_names: Iterable[str], architecture: str) -> dict[str, str]:
    """Hugging Face name to GGUF name, for every weight of a dense model.

    Args:
        gguf_names: of the file's tensors.
        architecture: llama, minicpm or minicpm3.

    Raises:
        CheckpointError: a tensor that the architecture does not have; computing without it would be wrong.
    """
    names, in_layer = {}, IN_LAYER | (LATENT if architecture == "minicpm3" else DENSE)
    for gguf_name in gguf_names:
        if gguf_name in ROPE_TENSORS:
            continue
        match = LAYER.fullmatch(gguf_name)
        if match and match[2] in in_layer:
            names[f"model.layers.{match[1]}.{in_layer[match[2]]}.{match[3]}"] = gguf_name
        elif gguf_name in TOP_LEVEL:
            names[TOP_LEVEL[gguf_name]] = gguf_name
        else:
            raise CheckpointError(
                f"the GGUF tensor {gguf_name} is not part of a dense {architecture} model",
                hint="export from the original Hugging Face checkpoint",
            )
    return names


def permuted_heads(hf_name: str, heads: int, kv_heads: int) -> int | None:
    """Number of heads over whose rows llama.cpp's converter permuted this tensor; None: not permuted."""
    if ".q_proj." in hf_name:
        return heads
    if ".k_proj." in hf_name:
        return kv_heads
    return None


def stored_rows(rows: npt.NDArray[np.int64], head_dim: int) -> npt.NDArray[np.int64]:
    """Where the GGUF file keeps the given rows of a query or key weight.

    The converter writes each head's two halves interleaved (row j of half s goes to 2 j + s), for the
    rotation of neighbours that llama.cpp applies; Hugging Face rotates half against half.
    """
    head, row = np.divmod(rows, head_dim)
    half, j = np.divmod(row, head_dim // 2)
    stored: npt.NDArray[np.int64] = head * head_dim + 2 * j + half
    return stored
