from __future__ import annotations

import pytest

from cpm_edge.plugins.mixture_of_experts.spec import MixtureOfExpertsSpec


def test_attributes_are_the_fields_by_name() -> None:
    assert MixtureOfExpertsSpec(8, 2).attributes() == {"num_experts": 8, "top_k": 2}


@pytest.mark.parametrize("top_k", [0, -1, 9])
def test_a_choice_that_cannot_be_made_is_refused(top_k: int) -> None:
    with pytest.raises(ValueError, match=rf"top_k: expected 1 to num_experts \(8\), got {top_k}"):
        MixtureOfExpertsSpec(8, top_k)
