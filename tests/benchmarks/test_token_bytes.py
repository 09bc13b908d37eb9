from __future__ import annotations

from typing import Any

import pytest

from cpm_edge.benchmarks.shape import Shape
from cpm_edge.benchmarks.token_bytes import (
    TokenBytes,
    WeightBytes,
    attention_spec,
    cache_bytes,
    linear_elements,
    token_bytes,
)
from cpm_edge.plugins.sparse_attention.spec import SparseAttentionSpec
from tests.support.bundles import Bundles

NATIVE: dict[str, Any] = {
    "weight_format": "int4",
    "group_size": 32,
    "flavour": "native",
    "activations": "int8",
}
SPARSE = SparseAttentionSpec(16, 2, 0.125)


def test_a_dense_row_reads_every_key_and_value() -> None:
    spec = SparseAttentionSpec.dense(16, 2, 0.125)
    # 2 kv heads, keys and values of 64 halves for each of 257 rows.
    assert cache_bytes(spec, 64, 256) == 2 * 2 * 257 * 64 * 2
    assert cache_bytes(spec, 64, 256, item=1) == 2 * 2 * 257 * 64


def test_a_sparse_row_reads_pooled_keys_and_its_blocks() -> None:
    # Position 32767 ends block 511: (32768 - 32) / 16 + 1 = 2047 windows of 64 floats, 64 + 32 whole blocks.
    assert cache_bytes(SPARSE, 64, 32767) == 2 * (2047 * 64 * 4 + 2 * 96 * 64 * 64 * 2)
    # The next one starts block 512: 95 whole blocks and one row.
    assert cache_bytes(SPARSE, 64, 32768) == 2 * (2047 * 64 * 4 + 2 * (95 * 64 + 1) * 64 * 2)


def test_below_dense_len_a_sparse_spec_reads_like_a_dense_one() -> None:
    assert cache_bytes(SPARSE, 64, 8190) == 2 * 2 * 8191 * 64 * 2
    assert cache_bytes(SPARSE, 64, 8191) == 2 * (511 * 64 * 4 + 2 * 96 * 64 * 64 * 2)


def test_linear_layers_of_the_real_shape() -> None:
    config = Shape.open("minicpm4-0.5b").parsed()
    # q and o 1024 x 1024, k and v 128 x 1024, three of 4096 x 1024.
    assert linear_elements(config) == 24 * (2 * 1024 * 1024 + 2 * 128 * 1024 + 3 * 4096 * 1024)


def test_the_bytes_of_a_bundle(bundles: Bundles) -> None:
    """The tiny sparse variant: hidden 64, intermediate 96, 4 and 2 heads of 16, vocabulary 320, 2 layers."""
    bundle = bundles.open("sparse", "aipc", **NATIVE)
    per_layer = 64 * 64 + 2 * 32 * 64 + 64 * 64 + 3 * 96 * 64
    linear = 2 * per_layer * (16 + 2) // 32  # 16 bytes of codes and a float16 scale for 32 weights
    head = 320 * (64 + 2)
    assert WeightBytes.of(bundle) == WeightBytes(linear, head)
    read = token_bytes(bundle, [40, 41])
    assert read.embedding == 64
    assert read.cache == 2 * 2 * 2 * 16 * 2 * (41 + 42) / 2
    assert read.total == linear + head + 64 + read.cache
    assert attention_spec(bundle).topk == 3


def test_the_share_of_the_bandwidth() -> None:
    read = TokenBytes(linear=600, head=300, embedding=0, cache=100)
    assert read.share(50, 100_000) == pytest.approx(0.5)
