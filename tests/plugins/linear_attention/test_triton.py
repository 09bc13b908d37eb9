"""The Triton kernels against numpy, and the plan that launches them."""

from __future__ import annotations

import pytest

from cpm_edge.plugins.linear_attention.launches import chunked, linear_attention_plan, recurrent
from tests.plugins.linear_attention.cases import make_spec
from tests.support.interpreted import run_interpreted


def test_every_kernel_in_the_interpreter() -> None:
    assert run_interpreted("tests/plugins/linear_attention/interpreted.py") == 22


@pytest.mark.parametrize("sizes", [(12, 16), (136, 128), (64, 8), (64, 20)], ids=str)
def test_sizes_without_a_kernel_are_refused(sizes: tuple[int, int]) -> None:
    with pytest.raises(ValueError, match="head size: expected a multiple of 8 from 16 to 128, got"):
        linear_attention_plan(make_spec(2, 64), *sizes)


def test_a_row_is_recurrent_and_more_are_chunked() -> None:
    plan = linear_attention_plan(make_spec(32, 128), 128, 128)
    assert plan.workspace_bytes(512) == 0
    assert plan.kernels() == [recurrent(128, 128), chunked(128, 128)]
    one, many = (plan.variant(rows).launches[0] for rows in (1, 2))
    assert (one.kernel.name, many.kernel.name) == ("linear_recurrent_d128", "linear_chunked_d128")
    assert one.grid(1) == many.grid(500) == (128, 1, 1)  # four tiles of columns for each of 32 heads
    assert chunked(64, 96).name == "linear_chunked_d64_v96"
