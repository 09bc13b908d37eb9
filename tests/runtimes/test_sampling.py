from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from cpm_edge.runtimes.errors import BackendError, BundleError
from cpm_edge.runtimes.options import GenerationOptions
from cpm_edge.runtimes.sampling import Sampler

LOGITS = st.lists(st.integers(-20, 20), min_size=1, max_size=40).map(lambda x: np.array(x, np.float32) / 4)


def sampler(**options: Any) -> Sampler:
    return Sampler(GenerationOptions(**options))


def reference_candidates(logits: np.ndarray, t: float, k: int, p: float, min_p: float) -> dict[int, float]:
    """Probabilities by the definition, one token at a time."""
    prob = {i: float(x) for i, x in enumerate(logits.astype(np.float64) / t)}
    if k:
        threshold = sorted(prob.values(), reverse=True)[min(k, len(prob)) - 1]
        prob = {i: x for i, x in prob.items() if x >= threshold}
    top = max(prob.values())
    prob = {i: np.exp(x - top) for i, x in prob.items()}
    total = sum(prob.values())
    kept, mass = {}, 0.0
    for i in sorted(prob, key=lambda i: (-prob[i], i)):
        if mass / total >= p:
            break
        kept[i] = prob[i]
        mass += prob[i]
    kept = {i: x for i, x in kept.items() if x >= min_p * max(kept.values())}
    return {i: x / sum(kept.values()) for i, x in kept.items()}


@given(LOGITS, st.sampled_from([0.3, 1.0, 2.5]), st.integers(0, 10), st.sampled_from([1.0, 0.9, 0.31, 0.01]),
       st.sampled_from([0.0, 0.07, 0.5]), st.integers(0, 5))  # fmt: skip
def test_only_candidates_are_drawn(
    logits: np.ndarray, t: float, k: int, p: float, min_p: float, seed: int
) -> None:
    draws = sampler(temperature=t, top_k=k, top_p=p, min_p=min_p, seed=seed)
    allowed = reference_candidates(logits, t, k, p, min_p)
    # min_p at a tie of floating point may go either way: every value here is a multiple of 1/4.
    assert {draws.pick(logits) for _ in range(20)} <= set(allowed)


def test_frequencies_follow_the_probabilities() -> None:
    logits = np.array([1.0, 3.0, 2.0, -5.0, 2.5], np.float32)
    draws = sampler(temperature=0.8, top_k=4, top_p=0.95, min_p=0.05, seed=3)
    expected = reference_candidates(logits, 0.8, 4, 0.95, 0.05)
    count = np.bincount([draws.pick(logits) for _ in range(20_000)], minlength=5) / 20_000
    for token in range(5):
        assert abs(count[token] - expected.get(token, 0.0)) < 0.02


def test_top_p_over_a_flat_large_vocabulary_widens_its_ranking() -> None:
    logits = np.zeros(130_000, np.float32)
    logits[:5000] = 1e-3 * np.arange(5000)[::-1]
    draws = sampler(temperature=1.0, top_p=0.5, seed=0)
    expected = reference_candidates(logits, 1.0, 0, 0.5, 0.0)
    drawn = {draws.pick(logits) for _ in range(200)}
    assert drawn <= set(expected)
    assert max(drawn) > 1000


def test_top_p_that_is_reached_exactly_takes_no_more() -> None:
    draws = sampler(temperature=1.0, top_p=0.5, seed=0)
    assert {draws.pick(np.zeros(2, np.float32)) for _ in range(50)} == {0}


@given(LOGITS)
def test_greedy_takes_the_highest_and_of_equals_the_lowest_id(logits: np.ndarray) -> None:
    before = logits.copy()
    assert sampler().pick(logits) == int(logits.argmax())
    np.testing.assert_array_equal(logits, before)


def test_the_seed_repeats_and_differs() -> None:
    logits = np.random.default_rng(0).standard_normal(1000).astype(np.float32)

    def draw(seed: int | None) -> list[int]:
        one = sampler(temperature=1.0, seed=seed)
        return [one.pick(logits) for _ in range(20)]

    assert draw(1) == draw(1)
    assert draw(1) != draw(2)
    assert draw(None) != draw(None)


def test_repetition_penalty_divides_positive_and_multiplies_negative_logits() -> None:
    logits = np.array([2.0, 1.5, -1.0, -1.9], np.float32)
    one = sampler(repetition_penalty=2.0)
    one.observe([0])
    assert one.pick(logits) == 1  # 2.0 / 2 < 1.5; token 1 is seen from now on
    assert one.pick(logits) == 0  # 1.0 > 0.75
    negative = sampler(repetition_penalty=2.0)
    negative.observe([0])
    assert negative.pick(np.array([-1.0, -1.9], np.float32)) == 1  # -2.0 < -1.9


@pytest.mark.parametrize("value", [np.nan, np.inf])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_unusable_logits_are_an_error(value: float, temperature: float) -> None:
    with pytest.raises(BackendError, match="unusable logits"):
        sampler(temperature=temperature).pick(np.array([0.0, value], np.float32))


def test_excluded_tokens_are_never_drawn() -> None:
    logits = np.array([-np.inf, 0.0, -np.inf], np.float32)
    assert sampler(temperature=5.0, top_k=3, seed=0).pick(logits) == 1
    with pytest.raises(BackendError):
        sampler().pick(np.full(3, -np.inf, np.float32))


@pytest.mark.parametrize(
    "bad",
    [{"temperature": -1}, {"temperature": float("nan")}, {"top_p": 0}, {"top_p": 1.1}, {"top_k": -1},
     {"min_p": 2}, {"repetition_penalty": 0}, {"max_new_tokens": 0}, {"seed": -1}, {"stop": [""]}],
)  # fmt: skip
def test_options_out_of_range(bad: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=f"{next(iter(bad))}: expected"):
        GenerationOptions(**bad)


def test_a_single_stop_string_is_one_string() -> None:
    assert GenerationOptions(stop="END").stop == ("END",)  # type: ignore[arg-type]
    assert GenerationOptions().replace(stop=["a", "b"]).stop == ("a", "b")


def test_unknown_options_are_named() -> None:
    with pytest.raises(TypeError, match="unknown option 'temprature'"):
        GenerationOptions().replace(temprature=1)


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        ({}, GenerationOptions()),
        ({"temperature": 0.8, "top_p": 0.8}, GenerationOptions()),
        ({"do_sample": False, "temperature": 0.8}, GenerationOptions()),
        ({"do_sample": True, "top_p": 0.8}, GenerationOptions()),
        ({"do_sample": True, "temperature": 0.8, "top_p": 0.8, "top_k": None, "max_length": 20},
         GenerationOptions(temperature=0.8, top_p=0.8)),
        ({"repetition_penalty": 1.05}, GenerationOptions(repetition_penalty=1.05)),
    ],
)  # fmt: skip
def test_defaults_come_from_generation_config(config: dict[str, Any], expected: GenerationOptions) -> None:
    assert GenerationOptions.from_generation_config(config) == expected


@pytest.mark.parametrize("value", [5, "high"])
def test_a_bad_generation_config_is_the_bundles_fault(value: Any) -> None:
    with pytest.raises(BundleError, match=r"generation_config.json"):
        GenerationOptions.from_generation_config({"do_sample": True, "temperature": 1.0, "top_p": value})
