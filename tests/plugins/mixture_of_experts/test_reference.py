from __future__ import annotations

import numpy as np
import pytest

from cpm_edge.plugins.mixture_of_experts.reference import mixture_of_experts, route
from tests.plugins.mixture_of_experts.cases import make_case


@pytest.mark.parametrize(("experts", "top_k"), [(8, 2), (5, 3), (4, 1), (3, 3)])
def test_it_is_the_definition(experts: int, top_k: int) -> None:
    case = make_case(experts, top_k, 13, batch=2)
    x, logits = case.x.astype(np.float64), case.logits.astype(np.float64)
    got = mixture_of_experts(x, logits, *case.weights, spec=case.spec)
    np.testing.assert_allclose(got, case.expected(), rtol=1e-12, atol=1e-12)


def test_ties_go_to_the_lowest_index_and_shares_add_up_to_one() -> None:
    chosen = route(np.array([1.0, 3.0, 3.0, 3.0, 0.0]), 2)
    assert [expert for expert, _ in chosen] == [1, 2]
    assert [share for _, share in chosen] == [0.5, 0.5]


def test_large_logits_do_not_overflow() -> None:
    expert, share = route(np.array([1e4, 1e4 - 1, 0.0]), 2)[0]
    assert expert == 0 and share == pytest.approx(1 / (1 + np.exp(-1)))
