from __future__ import annotations

from typing import Any

import pytest

from cpm_edge.benchmarks.token_bytes import (
    TokenBytes,
    WeightBytes,
    attention_spec,
    cache_bytes,
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


def test_states_are_read_and_written_at_any_position(bundles: Bundles) -> None:
    """Two layers have caches, two have states of 4 heads of 24 x 24 floats."""
    bundle = bundles.open("sala", "aipc", **NATIVE)
    short, long = (token_bytes(bundle, [position]).cache for position in (40, 50))
    assert short == 2 * 2 * 2 * 16 * 2 * 41 + 2 * 2 * 4 * 24 * 24 * 4
    assert long - short == 2 * 2 * 2 * 16 * 2 * 10


def test_the_share_of_the_bandwidth() -> None:
    read = TokenBytes(linear=600, head=300, embedding=0, cache=100)
    assert read.share(50, 100_000) == pytest.approx(0.5)
