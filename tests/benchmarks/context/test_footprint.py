from __future__ import annotations

from cpm_edge.benchmarks.context.footprint import footprint_table
from tests.benchmarks.tables import cells

PARTS = {"weights": 277, "keys_and_values": 1611, "pooled_keys": 101, "scratch": 37, "rest": 141}


def test_what_stands_above_the_sum_adds_up_to_it() -> None:
    megabytes = {**PARTS, "states": 0, "resident": sum(PARTS.values()), "peak": 2168, "given_back": 51}
    rows = cells(footprint_table({name: value * 10**6 for name, value in megabytes.items()}, 131072))
    names = [name for name, _ in rows]
    assert names[-3:-1] == ["resident, sum of the above", "peak (VmHWM)"]
    assert names[-1].startswith("not in the sum: ")
    above = [int(value) for _, value in rows[: len(PARTS)]]
    assert sum(above) == int(dict(rows)["resident, sum of the above"])
