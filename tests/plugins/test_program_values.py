from __future__ import annotations

from random import Random

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from cpm_edge.plugins.program import Values


def spans(live: list[tuple[int, int]]) -> set[int]:
    return {place for offset, floats in live for place in range(offset, offset + floats)}


@settings(deadline=None)
@given(st.lists(st.tuples(st.sampled_from(["take", "fresh", "give_back"]), st.integers(1, 70))))
def test_values_never_share_a_place_and_begin_at_cache_lines(moves: list[tuple[str, int]]) -> None:
    values, live, every = Values(), list[tuple[int, int]](), list[tuple[int, int]]()
    for move, floats in moves:
        if move == "give_back":
            if live:
                values.give_back(*live.pop(floats % len(live)))
            continue
        before = values.size
        offset = getattr(values, move)(floats)
        new = spans([(offset, floats)])
        assert offset % 16 == 0 and max(new) < values.size
        assert not new & spans(live if move == "take" else every)
        assert move == "take" or offset == before
        live.append((offset, floats))
        every.append((offset, floats))
    array = values.array()
    assert array.size == values.size and array.dtype == np.float32 and not array.any()
    assert not array.size or array.ctypes.data % 64 == 0


@settings(deadline=None)
@given(st.lists(st.integers(1, 70), min_size=1), st.randoms(use_true_random=False))
def test_values_that_were_given_back_are_taken_again(sizes: list[int], random: Random) -> None:
    values = Values()
    places = [(values.take(floats), floats) for floats in sizes]
    size = values.size
    for place in places:
        values.give_back(*place)
    random.shuffle(sizes)
    assert {values.take(floats) for floats in sizes} == {offset for offset, _ in places}
    assert values.size == size
