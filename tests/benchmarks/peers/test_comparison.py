from __future__ import annotations

import pytest

from cpm_edge.benchmarks.peers import comparison as module
from cpm_edge.benchmarks.peers.comparison import Comparison, compare, roofline_table
from cpm_edge.benchmarks.token_bytes import TokenBytes
from cpm_edge.exporter.progress import Progress
from tests.benchmarks.tables import cells


class FakePeer:
    """Answers from a list, and writes down when it was asked."""

    def __init__(self, label: str, prefill: list[float], decode: list[float], log: list[str]) -> None:
        self.label = label
        self._prefill, self._decode, self._log = list(prefill), list(decode), log

    def prefill(self, tokens: int) -> float:
        self._log.append(f"{self.label} prefill {tokens}")
        return self._prefill.pop(0)

    def decode(self, context: int, new_tokens: int) -> float:
        self._log.append(f"{self.label} decode {context} {new_tokens}")
        return self._decode.pop(0)

    def close(self) -> None:
        raise AssertionError("not the comparison's to close")


@pytest.fixture
def measured(monkeypatch: pytest.MonkeyPatch) -> tuple[Comparison, list[str]]:
    bandwidths = iter([20e9, 30e9, 25e9])
    monkeypatch.setattr(module, "read_bandwidth", lambda threads, repeat: next(bandwidths))
    log: list[str] = []
    peers = [
        FakePeer("ours", [300, 200, 250], [100, 80, 90], log),
        FakePeer("theirs", [100, 110, 500], [40, 50, 45], log),
    ]
    result = Comparison(512, 32, (256,))
    compare(peers, result, repeat=3, threads=2, progress=Progress(enabled=False))
    return result, log


def test_peers_take_turns_in_every_repeat(measured: tuple[Comparison, list[str]]) -> None:
    turn = ["ours prefill 512", "theirs prefill 512", "ours decode 256 32", "theirs decode 256 32"]
    assert measured[1] == 3 * turn


def test_the_table_has_medians_spreads_and_ratios(measured: tuple[Comparison, list[str]]) -> None:
    rows = cells(measured[0].table())
    assert rows[0] == ["ours", "250.0 (200.0..300.0)", "1.00", "90.0 (80.0..100.0)", "1.00"]
    assert rows[1] == ["theirs", "110.0 (100.0..500.0)", "2.27", "45.0 (40.0..50.0)", "2.00"]
    assert measured[0].to_json()["rates"]["theirs"]["decode"] == {"256": [40, 50, 45]}


def test_the_roofline(measured: tuple[Comparison, list[str]]) -> None:
    read = TokenBytes(linear=200_000_000, head=30_000_000, embedding=0, cache=20e6)
    row = measured[0].roofline("ours", 256, read)
    assert row["bandwidth"] == 25e9 and row["total_bytes"] == 250e6
    assert row["possible"] == pytest.approx(100) and row["share"] == pytest.approx(0.9)
    (line,) = cells(roofline_table({"ours": {256: row}}))
    assert line == ["ours", "256", "200.0", "30.0", "20.0", "25.0", "100.0", "90.0", "90%"]
