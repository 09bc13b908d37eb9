"""What one decode step has to read from memory: the roof that bandwidth sets to tokens a second.

Counted once a token: the linear layers and the head as the bundle stores them (codes, scales, zero points),
one row of the embedding, the part of the KV cache that the attention reads, and the states of recurrent
layers, read and written. Norm weights, activations and logits are left out: a thousandth of that.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from xml.etree import ElementTree

from cpm_edge.plugins.sparse_attention.spec import SparseAttentionSpec
from cpm_edge.runtimes.bundle import Bundle
from cpm_edge.runtimes.cache_layout import RecurrentLayout, kv_layers
from cpm_edge.runtimes.openvino.native import MODEL

PANELS = ".panels"
_HEADS = ("lm_head.weight.panels", "model.embed_tokens.weight.panels")
_ITEM = {"float32": 4, "float16": 2, "bfloat16": 2, "int8": 1}


@dataclass(frozen=True)
class WeightBytes:
    """Bytes of a native bundle's packed matrices."""

    linear: int
    head: int

    @classmethod
    def of(cls, bundle: Bundle) -> WeightBytes:
        """Read the sizes from the bundle's model file."""
        linear = head = 0
        layers = ElementTree.parse(bundle.file(MODEL)).getroot().find("layers")
        for layer in layers if layers is not None else ():
            name, data = layer.get("name", ""), layer.find("data")
            if layer.get("type") != "Const" or not name.endswith(PANELS) or data is None:
                continue
            if name in _HEADS:
                head += int(data.get("size", "0"))
            else:
                linear += int(data.get("size", "0"))
        return cls(linear, head)


@dataclass(frozen=True)
class TokenBytes:
    """Bytes that one token moves; ``cache`` holds the states too."""

    linear: int
    head: int
    embedding: int
    cache: float

    @property
    def total(self) -> float:
        return self.linear + self.head + self.embedding + self.cache

    def share(self, tokens_per_second: float, bandwidth: float) -> float:
        """Which part of ``bandwidth`` (bytes a second) a decode speed amounts to."""
        return tokens_per_second * self.total / bandwidth


def read_rows(spec: SparseAttentionSpec, position: int) -> tuple[int, int]:
    """(rows of keys and values, pooled keys) that the query at ``position`` reads, for each kv head.

    A dense row reads every row up to itself. A sparse row reads the pooled keys of every complete window and
    the rows of its chosen blocks, the last of which ends at the row itself.
    """
    rows = position + 1
    if spec.is_dense or rows < spec.dense_len:
        return rows, 0
    windows = max(0, (rows - spec.kernel_size) // spec.kernel_stride + 1)
    blocks = min(spec.budget, position // spec.block_size + 1)
    return (blocks - 1) * spec.block_size + position % spec.block_size + 1, windows


def cache_bytes(spec: SparseAttentionSpec, head_size: int, position: int, item: int = 2) -> int:
    """Bytes of one layer's cache that the query at ``position`` reads; pooled keys are float32.

    Args:
        item: bytes of one cached key or value element.
    """
    rows, windows = read_rows(spec, position)
    return spec.kv_num_heads * head_size * (2 * rows * item + 4 * windows)


def token_bytes(bundle: Bundle, positions: Sequence[int]) -> TokenBytes:
    """The mean over decode steps at these positions."""
    manifest = bundle.manifest
    weights = WeightBytes.of(bundle)
    spec = attention_spec(bundle)
    head_size, item = manifest.cache["head_dim"], _ITEM[manifest.cache["dtype"]]
    each = [cache_bytes(spec, head_size, position, item) for position in positions]
    recurrent = RecurrentLayout.of(manifest.cache)
    states = 2 * recurrent.nbytes if recurrent else 0
    cache = len(kv_layers(manifest.cache)) * sum(each) / len(each) + states
    row = manifest.hidden_size * {"int8": 1, "fp32": 4}.get(manifest.weights["embedding"].split()[0], 2)
    return TokenBytes(weights.linear, weights.head, row, cache)


def attention_spec(bundle: Bundle) -> SparseAttentionSpec:
    """The attention op's attributes, from the manifest."""
    fields = SparseAttentionSpec.__dataclass_fields__
    return SparseAttentionSpec(**{k: v for k, v in bundle.manifest.attention.items() if k in fields})
