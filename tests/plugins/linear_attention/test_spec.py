from __future__ import annotations

import math

import pytest

from cpm_edge.plugins.linear_attention.spec import LinearAttentionSpec


def test_attributes_are_the_fields_by_name() -> None:
    spec = LinearAttentionSpec((-0.5, 0.0), 0.125)
    assert spec.num_heads == 2
    assert spec.attributes() == {"decay": [-0.5, 0.0], "scale": 0.125}


@pytest.mark.parametrize(
    ("decay", "scale", "message"),
    [
        ((), 1.0, "expected one logarithm a head, got none"),
        ((-1.0, 0.5), 1.0, "0 or less, got 0.5 for head 1"),
        ((math.nan,), 1.0, "got nan for head 0"),
        ((-math.inf,), 1.0, "got -inf for head 0"),
        ((-1.0,), math.inf, "scale: expected a finite number, got inf"),
    ],
)
def test_what_makes_no_sense_is_refused(decay: tuple[float, ...], scale: float, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        LinearAttentionSpec(decay, scale)
