"""What is shown where nobody watches."""

from __future__ import annotations

import pytest

from cpm_edge.exporter import progress
from cpm_edge.exporter.progress import Progress


class Clock:
    def __init__(self) -> None:
        self.now = 1e6

    def monotonic(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(progress, "LINE_SECONDS", 60.0)
    monkeypatch.setattr(progress, "time", clock)
    monkeypatch.setattr(progress._Line, "_last", clock.now)
    return clock


def test_a_log_gets_a_line_a_minute(clock: Clock, capsys: pytest.CaptureFixture[str]) -> None:
    shown = Progress()
    with shown.stage("Short"):
        clock.now += 50
    with shown.weights("Calibrating", 400):
        shown.advance(80)  # by an earlier run
        for _ in range(4):
            clock.now += 50
            shown.advance(40)
    with shown.stage("Soon after"):
        clock.now += 70
    with shown.stage("Verifying"):
        pass
    assert capsys.readouterr().err.splitlines() == [
        "Calibrating: 30%",
        "Calibrating: 50%, 0:04:10 left",
        "Verifying",
    ]


def test_who_asked_for_none_gets_none(clock: Clock, capsys: pytest.CaptureFixture[str]) -> None:
    shown = Progress(enabled=False)
    with shown.weights("Calibrating", 400):
        clock.now += 1000
        shown.advance(100)
    with shown.stage("Verifying"):
        pass
    assert capsys.readouterr().err == ""
