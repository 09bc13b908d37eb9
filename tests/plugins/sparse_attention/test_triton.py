"""The Triton kernels against the reference, and the plans that launch them."""

from __future__ import annotations

import pytest

from cpm_edge.plugins.launch_plan import ROWS
from cpm_edge.plugins.sparse_attention.launches import plan
from cpm_edge.plugins.sparse_attention.spec import SparseAttentionSpec
from tests.plugins.sparse_attention.cases import small_spec
from tests.support.interpreted import run_interpreted

PUBLISHED = SparseAttentionSpec(32, 2, 128**-0.5)


def test_every_kernel_in_the_interpreter() -> None:
    assert run_interpreted("tests/plugins/sparse_attention/interpreted.py") == 11


def test_a_sparse_step_has_six_launches_and_a_dense_one_three() -> None:
    names = [each.kernel.function for each in plan(PUBLISHED, 128, 32768).variant(1).launches]
    select = ["block_statistics", "block_scores", "select_blocks"]
    assert names == ["append_rows", *select, "attend", "join_splits"]
    dense = plan(SparseAttentionSpec.dense(32, 2, 1.0), 128, 32768)
    assert [each.kernel.function for each in dense.variant(1).launches] == [names[0], *names[-2:]]
    assert [each.kernel.function for each in dense.variant(32).launches] == [names[0], *names[-2:]]
    assert [each.kernel.function for each in dense.variant(33).launches] == [names[0], "attend"]


def test_a_cache_below_dense_len_needs_no_selection_but_keeps_its_pooled_keys() -> None:
    launches = plan(PUBLISHED, 128, 4096).variant(512).launches
    assert [each.kernel.function for each in launches] == ["append_rows", "attend"]
    assert "pooled" in launches[0].arguments and "chosen" not in launches[1].arguments


def test_scratch_memory_grows_with_rows_and_not_with_their_product() -> None:
    found = plan(PUBLISHED, 128, 131072)
    sizes = {each.name: each.nbytes(512) for each in found.workspaces}
    assert sizes["scores"] == 512 * 2 * 2 * 2048 * 4
    assert sizes["chosen"] == 512 // 4 * 2 * 2048 * 4
    assert found.workspace_bytes(512) < 24 << 20
    assert all(ROWS not in each.name for each in found.workspaces)


def test_decode_fills_the_chip_whatever_the_heads() -> None:
    for heads, kv_heads in ((32, 2), (9, 3), (36, 36), (8, 1)):
        attend = plan(SparseAttentionSpec.dense(heads, kv_heads, 1.0), 64, 4096).variant(1).launches[1]
        x, y, z = attend.grid(1)
        assert (x, y) == (1, kv_heads) and y * z >= 32


@pytest.mark.parametrize(
    ("spec", "size", "capacity", "message"),
    [
        (
            SparseAttentionSpec.latent(4, 1.0, 32),
            48,
            64,
            "v_head_size: expected 0 .* choose the stock flavour",
        ),
        (
            SparseAttentionSpec.dense(4, 2, 1.0),
            160,
            64,
            "head size: expected 1 to 128, got 160",
        ),
        (SparseAttentionSpec.dense(4, 2, 1.0), 64, 100, "capacity: expected a multiple of 16, got 100"),
        (small_spec(), 16, 8, "capacity: expected a multiple of 16, got 8"),
        (PUBLISHED, 128, 2**19 + 64, "capacity: expected at most 524288, got 524352"),
        (PUBLISHED, 128, 2048 + 32, "capacity: expected a multiple of 64, got 2080"),
        (
            small_spec(kernel_size=12, kernel_stride=6, block_size=24, window_size=48),
            16,
            48,
            "kernel_stride: expected a power of two of at least 4, got 6",
        ),
    ],
)
def test_what_has_no_kernel_is_refused(
    spec: SparseAttentionSpec, size: int, capacity: int, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        plan(spec, size, capacity)
