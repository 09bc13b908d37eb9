from __future__ import annotations

from typing import Any

import pytest

from cpm_edge.plugins.sparse_attention.spec import SparseAttentionSpec


def test_the_defaults_are_the_published_settings() -> None:
    spec = SparseAttentionSpec(32, 2, 128**-0.5)
    assert (spec.group, spec.local_blocks, spec.budget) == (16, 33, 96)
    assert not spec.is_dense


def test_dense_needs_nothing_of_the_sparse_attributes() -> None:
    spec = SparseAttentionSpec.dense(9, 3, 0.125)
    assert spec.is_dense and spec.group == 3 and spec.attributes()["topk"] == 0
    # Attributes without effect are not checked either.
    SparseAttentionSpec(4, 2, 1.0, kernel_size=5, kernel_stride=4, block_size=9, topk=0)


def test_attributes_are_the_fields_by_name() -> None:
    spec = SparseAttentionSpec(4, 2, 0.25, kernel_size=8, kernel_stride=4, block_size=16, window_size=32)
    assert SparseAttentionSpec(**spec.attributes()) == spec  # type: ignore[arg-type]


def test_the_latent_form_has_one_attribute_more() -> None:
    spec = SparseAttentionSpec.latent(40, 96**-0.5, 256)
    assert spec.is_latent and spec.is_dense and (spec.kv_num_heads, spec.group) == (1, 40)
    assert spec.attributes()["v_head_size"] == 256
    assert not SparseAttentionSpec.dense(4, 2, 0.25).is_latent
    assert "v_head_size" not in SparseAttentionSpec.dense(4, 2, 0.25).attributes()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"v_head_size": 8},
            "v_head_size: expected 0 unless kv_num_heads is 1 and topk 0, got 8 with 2",
        ),
        ({"kv_num_heads": 3}, "num_heads: expected a multiple of 3, got 4"),
        ({"kernel_size": 12}, "kernel_size: expected 8 for stride 4, got 12"),
        ({"block_size": 32}, "block_size: expected 16 for stride 4, got 32"),
        ({"window_size": 40}, "window_size: expected a multiple of 16, got 40"),
        ({"init_blocks": -1}, "init_blocks: expected 0 or more, got -1"),
        ({"topk": 1}, r"topk: expected more than init_blocks \(1\), got 1"),
    ],
)
def test_what_the_kernels_lack_is_refused(changes: dict[str, Any], message: str) -> None:
    valid: dict[str, Any] = {
        "num_heads": 4,
        "kv_num_heads": 2,
        "scale": 0.25,
        "kernel_size": 8,
        "kernel_stride": 4,
        "block_size": 16,
        "window_size": 32,
        "topk": 3,
    }
    SparseAttentionSpec(**valid)
    with pytest.raises(ValueError, match=message):
        SparseAttentionSpec(**(valid | changes))
