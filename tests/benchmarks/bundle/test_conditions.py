"""What a system tells about load, clocks and energy, from files like its own."""

from __future__ import annotations

from pathlib import Path

import pytest

from cpm_edge.benchmarks.bundle.conditions import Conditions, Meter, Moment, between, look


def write(root: Path, **files: str) -> None:
    for name, content in files.items():
        path = root / name.replace("__", "/")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(content)


def test_work_of_others_is_told_from_our_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("os.cpu_count", lambda: 4)
    first = Moment(busy=100.0, own=10.0, wall=0.0, temperature=None, clock=None)
    alone = Moment(busy=119.0, own=29.0, wall=10.0, temperature=None, clock=None)
    loaded = Moment(busy=135.0, own=29.0, wall=10.0, temperature=None, clock=None)
    assert between(first, alone, tmp_path).others == 0
    assert between(first, alone, tmp_path).notes() == []
    found = between(first, loaded, tmp_path)
    assert found.others == pytest.approx(0.4)
    assert "other processes kept 40% of this machine busy" in found.notes()[0]


def test_clocks_that_fall_and_a_lazy_governor_are_said() -> None:
    notes = Conditions(hertz=[3e9, 2e9], governor="powersave").notes()
    assert "3.00 to 2.00 GHz" in notes[0] and "powersave" in notes[1]


def test_a_system_that_tells_nothing(tmp_path: Path) -> None:
    moment = look(tmp_path)
    assert (moment.busy, moment.temperature, moment.clock) == (None, None, None)
    assert Meter.of(tmp_path) is None
    assert between(moment, look(tmp_path), tmp_path).others is None


def test_energy_of_a_counter_that_starts_again(tmp_path: Path) -> None:
    zone = "sys__class__powercap__intel-rapl:0__"
    write(tmp_path, **{f"{zone}energy_uj": "90000000", f"{zone}max_energy_range_uj": "100000000"})
    write(tmp_path, **{f"{zone}name": "package-0"})
    platform = "sys__class__powercap__intel-rapl:1__"  # it has the package in it
    write(tmp_path, **{f"{platform}name": "psys", f"{platform}energy_uj": "1"})
    meter = Meter.of(tmp_path)
    assert meter is not None and "RAPL" in meter.source
    with meter:
        write(tmp_path, **{f"{zone}energy_uj": "5000000", f"{platform}energy_uj": "70000000"})
    assert meter.joules == pytest.approx(15)


def test_a_board_with_a_power_monitor(tmp_path: Path) -> None:
    place = "sys__bus__i2c__drivers__ina3221__1-0040__hwmon__hwmon3__"
    write(
        tmp_path,
        **{f"{place}in1_label": "VDD_IN", f"{place}in1_input": "5000", f"{place}curr1_input": "2000"},
    )
    meter = Meter.of(tmp_path)
    assert meter is not None and "VDD_IN" in meter.source
    with meter:
        assert meter._thread is not None
        meter._stop.wait(0.35)
    assert meter.joules > 0


def test_temperatures_and_clocks(tmp_path: Path) -> None:
    write(
        tmp_path,
        sys__class__thermal__thermal_zone0__temp="41000",
        sys__class__thermal__thermal_zone1__temp="63500",
    )
    write(tmp_path, sys__devices__system__cpu__cpu0__cpufreq__scaling_cur_freq="2000000")
    write(tmp_path, proc__stat="cpu  100 0 50 800 10 0 0 0 0 0\n")
    moment = look(tmp_path)
    assert (moment.temperature, moment.clock) == (63.5, 2e9)
    assert moment.busy == pytest.approx(1.5)
