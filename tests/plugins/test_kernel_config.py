"""What a launch is told: grids, and the way through JSON."""

from __future__ import annotations

import json

import pytest

from cpm_edge.plugins.kernel_config import KernelConfig, Parameter, Quotient
from cpm_edge.plugins.matmul_nbits.launches import SMALL, configurations, product


@pytest.mark.parametrize("config", configurations(), ids=lambda each: each.name)
def test_a_configuration_survives_json(config: KernelConfig) -> None:
    assert KernelConfig.from_json(json.loads(json.dumps(config.to_json()))) == config


def test_names_are_unique() -> None:
    names = [each.name for each in configurations()]
    assert len(set(names)) == len(names)


def test_grids_round_up() -> None:
    config = product(4, 128, tile=SMALL)
    assert config.grid_of({"m": 17, "n": 64}) == (2, 1, 1)
    assert config.grid_of({"m": 33, "n": 65}) == (6, 1, 1)


def test_wrong_parameters_are_refused() -> None:
    with pytest.raises(ValueError, match=r"x: expected one of .* got f64"):
        Parameter("x", "f64")
    with pytest.raises(ValueError, match="aligned pointer or integer"):
        Parameter("scale", "fp32", aligned=True)
    with pytest.raises(ValueError, match="k: grid: expected one of m, got n"):
        KernelConfig("k", "a", "b", (Parameter("m", "i32"),), {}, ((Quotient("n"),), (), ()))
