from __future__ import annotations

import json
import subprocess
import sys

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


def test_peak_memory_is_this_programs_own() -> None:
    """A small child of a large parent must not report the parent's size."""
    ballast = bytearray(200 << 20)
    code = "from cpm_edge.runtimes.stats import peak_rss; print(peak_rss())"
    peak = int(
        subprocess.run([sys.executable, "-c", code], capture_output=True, check=True, text=True).stdout
    )
    assert 4 << 20 < peak < len(ballast) // 2
