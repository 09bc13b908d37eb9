"""Which matrices of a decoder layer read the same inputs, and what makes these inputs."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from cpm_edge.exporter.models import llama, minicpm3, minicpm_moe, minicpm_sala

Channels = npt.NDArray[np.int64]


@dataclass(frozen=True)
class Part:
    """Matrices that read the very same rows of inputs.

    Attributes:
        key: of their second moment.
        readers: module names within the layer.
        expert: the one that they belong to, in a mixture of experts.
    """

    key: str
    readers: tuple[str, ...]
    expert: int | None = None


@dataclass(frozen=True)
class Site:
    """Inputs made by one parameter, whose channels may be scaled without changing the model.

    Attributes:
        parts: everything that is quantized and reads them.
        producer: name of the parameter, whose axis 0 are its channels: a norm, or a matrix from which every
            input is a linear function of one channel.
        channels: the channel of each input.
        others: float matrices that read the inputs too.
    """

    parts: tuple[Part, ...]
    producer: str
    channels: Channels
    others: tuple[str, ...] = ()


def layer_sites(layer: Any) -> tuple[Site, ...]:
    """The sites of a decoder layer, in the order in which they are computed.

    Rotary embedding and the softmax lie between q, k and what reads them, so those have no site as producers.
    Values pass attention as weighted sums over positions, channel by channel; a gate multiplies channel by
    channel.
    """
    return (*_attention(layer.self_attn), *_mlp(layer.mlp))


def _attention(module: Any) -> tuple[Site, Site] | tuple[Site, Site, Site]:
    if isinstance(module, minicpm3.LatentAttention):
        return _latent(module)
    if isinstance(module, minicpm_sala.LightningAttention):
        readers = ("q_proj", "k_proj", "v_proj", "z_proj")
        return _inner(readers), _output("o_norm.weight", np.arange(module.o_proj.in_features))
    assert isinstance(module, llama.Attention)
    gate = ("o_gate",) if isinstance(module, minicpm_sala.SparseAttention) else ()
    spec = module.spec
    size = module.o_proj.in_features // spec.num_heads
    head, within = np.divmod(np.arange(module.o_proj.in_features), size)
    return _inner(("q_proj", "k_proj", "v_proj", *gate)), _output(
        "v_proj.weight", head // spec.group * size + within
    )


def _latent(module: minicpm3.LatentAttention) -> tuple[Site, Site, Site]:
    heads = module.spec.num_heads
    size = module.o_proj.in_features // heads
    head, within = np.divmod(np.arange(module.o_proj.in_features), size)
    rank = Site(
        (Part("latent", ("self_attn.q_b_proj",)),),
        "self_attn.q_a_layernorm.weight",
        np.arange(module.q_b_proj.in_features),
    )
    values = head * (module.nope + size) + module.nope + within
    return _inner(("q_a_proj", "kv_a_proj_with_mqa")), rank, _output("kv_b_proj.weight", values)


def _inner(readers: tuple[str, ...]) -> Site:
    names = tuple(f"self_attn.{name}" for name in readers)
    return Site((Part("attention", names),), "input_layernorm.weight", _ALL)


def _output(producer: str, channels: Channels) -> Site:
    return Site((Part("output", ("self_attn.o_proj",)),), f"self_attn.{producer}", channels)


def _mlp(module: Any) -> tuple[Site, ...]:
    norm = "post_attention_layernorm.weight"
    if not isinstance(module, minicpm_moe.Experts):
        return (
            Site((Part("mlp", ("mlp.gate_proj", "mlp.up_proj")),), norm, _ALL),
            Site((Part("down", ("mlp.down_proj",)),), "mlp.up_proj.weight", _ALL),
        )
    names = [f"mlp.experts.{expert}" for expert in range(len(module.experts))]
    inner = tuple(Part(f"{name}.in", (f"{name}.w1", f"{name}.w3"), e) for e, name in enumerate(names))
    return (
        Site(inner, norm, _ALL, others=("mlp.gate",)),
        *(
            Site((Part(f"{name}.out", (f"{name}.w2",), e),), f"{name}.w3.weight", _ALL)
            for e, name in enumerate(names)
        ),
    )


_ALL = np.empty(0, np.int64)
"""Input i is channel i; how many there are is seen in the weights."""
