from __future__ import annotations

import json
import subprocess
import sys

from cpm_edge.runtimes.sparsity import MlpSparsity
from cpm_edge.runtimes.stats import Stats


def test_the_first_token_is_not_part_of_tpot() -> None:
    stats = Stats(prompt_tokens=30, cached_tokens=10, prefill_seconds=2.0, new_tokens=5, decode_seconds=2.0)
    assert stats.prefill_rate == 10
    assert stats.tpot_seconds == 0.5
    assert stats.decode_rate == 2


def test_rates_that_do_not_exist_are_none() -> None:
    for count in (0, 1):
        stats = Stats(new_tokens=count)
        assert stats.tpot_seconds is stats.decode_rate is stats.prefill_rate is None
        assert ("TPOT", "-") in stats.rows()
    assert json.loads(json.dumps(stats.to_json()))["decode_tokens_per_second"] is None


def test_what_mlps_left_out_is_told() -> None:
    before = MlpSparsity(neurons=100, active=90, weight_bytes=1000, read_bytes=950)
    after = MlpSparsity(neurons=300, active=100, weight_bytes=3000, read_bytes=1250)
    stats = Stats(mlp_sparsity=after.since(before))
    assert stats.mlp_sparsity == MlpSparsity(200, 10, 2000, 300)
    told = "95.0% of neurons inactive, 15.0% of up and down projections read"
    assert ("MLP sparsity", told) in stats.rows()
    assert stats.to_json()["mlp_sparsity"] == {"inactive_share": 0.95, "read_share": 0.15}
    assert after.since(after) is None and after.since(None) == after
    assert Stats().to_json()["mlp_sparsity"] is None
    assert all(name != "MLP sparsity" for name, _ in Stats().rows())


def test_peak_memory_is_this_programs_own() -> None:
    """A small child of a large parent must not report the parent's size."""
    ballast = bytearray(200 << 20)
    code = "from cpm_edge.runtimes.stats import peak_rss; print(peak_rss())"
    peak = int(
        subprocess.run([sys.executable, "-c", code], capture_output=True, check=True, text=True).stdout
    )
    assert 4 << 20 < peak < len(ballast) // 2
