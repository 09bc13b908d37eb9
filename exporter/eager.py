"""Running a model's torch modules on real weights: whole, or one layer in memory at a time."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from cpm_edge.exporter.configs import LlamaConfig
from cpm_edge.exporter.configs.llama import CAPACITY
from cpm_edge.exporter.configs.rope import RopeTable
from cpm_edge.exporter.models.llama import Cache
from cpm_edge.exporter.weights import EMBEDDING, HEAD

Read = Callable[[str], npt.NDArray[np.float32]]


@dataclass(frozen=True)
class EagerRun:
    """Results of one prompt.

    Attributes:
        logits: float32 (T, vocab).
        keys: float32 of each layer, (kv heads, T, head_dim) after RoPE or a recurrent layer's last state
            (heads, D, D): they show where two runs part.
    """

    logits: npt.NDArray[np.float32]
    keys: list[npt.NDArray[np.float32]]


def build_model(model_class: type[Any], config: LlamaConfig, rope: RopeTable) -> Any:
    """The model without weights (on the meta device)."""
    with torch.device("meta"):
        return model_class(config, rope).eval()


def load_weights(module: nn.Module, prefix: str, read: Read, tied: bool) -> None:
    """Give every parameter and buffer of ``module`` its tensor, by checkpoint name."""
    state = {}
    for name in module.state_dict():
        full = EMBEDDING if tied and prefix + name == HEAD else prefix + name
        state[name] = torch.from_numpy(read(full))
    module.load_state_dict(state, assign=True)


def empty_caches(config: LlamaConfig, capacity: int, batch: int = 1) -> list[Cache]:
    """Zeroed caches of every layer, with room for ``capacity`` tokens."""
    return [empty_cache(config, layer, capacity, batch) for layer in range(config.num_hidden_layers)]


def empty_cache(config: LlamaConfig, layer: int, capacity: int, batch: int = 1) -> Cache:
    """The zeroed cache of one layer."""
    shapes = config.layer_caches(layer).values()
    return tuple(torch.zeros(batch, *(capacity if d == CAPACITY else int(d) for d in s)) for s in shapes)


def run_streamed(
    model_class: type[Any], config: LlamaConfig, rope: RopeTable, read: Read, token_ids: Sequence[int]
) -> EagerRun:
    """Prefill ``token_ids`` with one layer's weights in memory at a time.

    Args:
        read: the float32 tensor of a checkpoint name.
    """
    return next(run_all_streamed(model_class, config, rope, read, [token_ids]))


@torch.no_grad()
def run_all_streamed(
    model_class: type[Any],
    config: LlamaConfig,
    rope: RopeTable,
    read: Read,
    sequences: Sequence[Sequence[int]],
) -> Iterator[EagerRun]:
    """``run_streamed`` of several sequences, for which every weight is read once.

    The logits of one sequence are in memory at a time.
    """
    model = build_model(model_class, config, rope)
    past = torch.zeros(1, dtype=torch.int64)
    tied = config.tie_word_embeddings

    load_weights(model.model.embed_tokens, "model.embed_tokens.", read, tied)
    load_weights(model.rotary, "rotary.", read, tied)
    embedded = [model.embed(torch.tensor([list(ids)]), past) for ids in sequences]
    hidden = [rows for rows, _, _ in embedded]
    model.model.embed_tokens.to_empty(device="meta")
    keys: list[list[npt.NDArray[np.float32]]] = [[] for _ in sequences]
    for index, layer in enumerate(model.model.layers):
        load_weights(layer, f"model.layers.{index}.", read, tied)
        for number, (rows, cos, sin) in enumerate(embedded):
            cache = empty_cache(config, index, rows.shape[1])
            hidden[number], present = layer(hidden[number], (cos, sin), past, cache)
            keys[number].append(present[0][0].numpy())
        layer.to_empty(device="meta")
    load_weights(model.model.norm, "model.norm.", read, tied)
    load_weights(model.lm_head, "lm_head.", read, tied)
    for rows, its_keys in zip(hidden, keys, strict=True):
        logits: Tensor = model.head(rows)
        yield EagerRun(logits[0].numpy(), its_keys)
