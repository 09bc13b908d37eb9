"""What else a measurement depends on: other work, clocks, temperatures, energy. None where it is not told."""

from __future__ import annotations

import contextlib
import os
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

LOADED = 0.05  # share of the machine's cores that others may keep busy before a report says so
SAMPLE_SECONDS = 0.1


@dataclass(frozen=True)
class Moment:
    """One look at the system.

    Attributes:
        busy, own: seconds that all cores together, and this process, were busy.
        wall: seconds of a clock.
        temperature: the hottest zone, degrees Celsius.
        clock: mean of the cores, hertz.
    """

    busy: float | None
    own: float
    wall: float
    temperature: float | None
    clock: float | None


@dataclass
class Conditions:
    """What happened between two moments; every field may be None.

    Attributes:
        others: share of the machine's cores that other processes kept busy.
        celsius, hertz: before and after.
        joules: energy of the package or board, and ``energy_source``.
    """

    others: float | None = None
    celsius: list[float | None] = field(default_factory=list)
    hertz: list[float | None] = field(default_factory=list)
    governor: str | None = None
    joules: float | None = None
    energy_source: str | None = None

    def notes(self) -> list[str]:
        """What a reader must know before believing the numbers."""
        found = []
        if self.others is not None and self.others > LOADED:
            found.append(
                f"other processes kept {self.others:.0%} of this machine busy meanwhile: "
                "these numbers are lower bounds"
            )
        first, last = [*self.hertz, None, None][:2]
        if first and last and last < 0.9 * first:
            found.append(f"clocks fell from {first / 1e9:.2f} to {last / 1e9:.2f} GHz meanwhile: throttled")
        if self.governor not in (None, "performance"):
            found.append(f"the cores' frequency governor is {self.governor}")
        return found


def look(root: Path = Path("/")) -> Moment:
    """The system now; ``root`` is where its files are."""
    own = sum(os.times()[:4])
    return Moment(_busy(root), own, time.perf_counter(), _temperature(root), _clock(root))


def between(first: Moment, last: Moment, root: Path = Path("/")) -> Conditions:
    """Without energy."""
    others = None
    if first.busy is not None and last.busy is not None and last.wall > first.wall:
        others = last.busy - first.busy - (last.own - first.own)
        others = max(0.0, others / ((last.wall - first.wall) * (os.cpu_count() or 1)))
    return Conditions(
        others=others,
        celsius=[first.temperature, last.temperature],
        hertz=[first.clock, last.clock],
        governor=_text(root / "sys/devices/system/cpu/cpu0/cpufreq/scaling_governor") or None,
    )


@contextlib.contextmanager
def watched(root: Path = Path("/")) -> Iterator[Conditions]:
    """The conditions of a block, filled in when it ends."""
    found, first = Conditions(), look(root)
    meter = Meter.of(root)
    with meter or contextlib.nullcontext():
        yield found
    vars(found).update(vars(between(first, look(root), root)))
    if meter is not None:
        found.joules, found.energy_source = meter.joules, meter.source


class Meter:
    """Energy of a block: a counter of the processor (RAPL), or samples of a board's power monitor."""

    def __init__(self, source: str, counters: list[Path], limits: list[int], channels: list[Path]) -> None:
        self.source = source
        self.joules = 0.0
        self._counters, self._limits, self._channels = counters, limits, channels
        self._stop = threading.Event()
        self._thread: threading.Thread | None = None

    @classmethod
    def of(cls, root: Path) -> Meter | None:
        """None where neither can be read, as on most systems without root."""
        zones = list((root / "sys/class/powercap").glob("intel-rapl:[0-9]"))
        # psys is the platform, which has the packages in it.
        zones = [zone for zone in zones if _text(zone / "name").startswith("package")]
        zones = [zone for zone in zones if _number(zone / "energy_uj") is not None]
        if zones:
            limits = [int(_number(zone / "max_energy_range_uj") or 0) for zone in zones]
            return cls("RAPL, whole package", [zone / "energy_uj" for zone in zones], limits, [])
        for monitor in (root / "sys/bus/i2c/drivers/ina3221").glob("*/hwmon/hwmon*"):
            for label in monitor.glob("in*_label"):
                channel = label.name.removeprefix("in").removesuffix("_label")
                if _text(label) == "VDD_IN" and _number(monitor / f"curr{channel}_input") is not None:
                    return cls("INA3221 VDD_IN, whole board", [], [], [monitor / channel])
        return None

    def __enter__(self) -> Meter:
        self._first = [_number(path) or 0.0 for path in self._counters]
        if self._channels:
            self._thread = threading.Thread(target=self._sample, daemon=True)
            self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        if self._thread is not None:
            self._thread.join()
        for path, first, limit in zip(self._counters, self._first, self._limits, strict=True):
            used = (_number(path) or first) - first
            self.joules += (used + limit if used < 0 else used) / 1e6  # the counter starts again at its limit

    def _sample(self) -> None:
        last = time.perf_counter()
        while not self._stop.wait(SAMPLE_SECONDS):
            now = time.perf_counter()
            for channel in self._channels:
                millivolts = _number(channel.parent / f"in{channel.name}_input") or 0.0
                milliamperes = _number(channel.parent / f"curr{channel.name}_input") or 0.0
                self.joules += millivolts * milliamperes / 1e6 * (now - last)
            last = now


def _busy(root: Path) -> float | None:
    """Seconds that cores did something since the start: all but idle and waiting for disks."""
    fields = _text(root / "proc/stat").split("\n", 1)[0].split()
    if len(fields) < 9 or fields[0] != "cpu":
        return None
    ticks = [int(field) for field in fields[1:9]]
    return (sum(ticks) - ticks[3] - ticks[4]) / os.sysconf("SC_CLK_TCK")


def _temperature(root: Path) -> float | None:
    zones = (root / "sys/class/thermal").glob("thermal_zone*/temp")
    found = [value / 1e3 for value in map(_number, zones) if value is not None and value > 0]
    return max(found, default=None)


def _clock(root: Path) -> float | None:
    paths = (root / "sys/devices/system/cpu").glob("cpu[0-9]*/cpufreq/scaling_cur_freq")
    found = [value * 1e3 for value in map(_number, paths) if value]
    return sum(found) / len(found) if found else None


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="ascii", errors="replace").strip()
    except OSError:
        return ""


def _number(path: Path) -> float | None:
    try:
        return float(_text(path))
    except ValueError:
        return None
