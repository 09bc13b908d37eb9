"""The chip profiles and the schema that they keep."""

from __future__ import annotations

import copy
import json
import subprocess
import sys
from typing import Any

import pytest
from click.testing import CliRunner

from cpm_edge.benchmarks.cli import main
from cpm_edge.benchmarks.plan import PlanError, chip, chips
from cpm_edge.benchmarks.plan.catalog import FOLDER
from cpm_edge.benchmarks.plan.chip import KINDS, parse_chip

ORIN = json.loads((FOLDER / "jetson-agx-orin-64gb.json").read_text())


def test_every_profile_keeps_the_schema_and_names_itself() -> None:
    assert len(chips()) >= 20
    assert {each.kind for each in chips().values()} == set(KINDS)
    assert all(each.sm is not None for each in chips().values() if each.kind in ("jetson", "rtx"))


def test_what_other_parts_read() -> None:
    orin = chip("jetson-agx-orin-64gb")
    assert (orin.sm, orin.kind, orin.target, orin.memory_bytes) == (87, "jetson", "jetson", 64 << 30)
    assert orin.bandwidth is not None and orin.bandwidth.value == 204.8e9 and orin.bandwidth.source
    assert orin.usable_bytes is not None and orin.usable_bytes < 64 << 30
    assert list(chip("core-ultra-7-258v").devices) == ["GPU", "CPU", "NPU"]
    assert chip("jetson-thor-t5000").sm == 110
    assert chip("jetson-thor-t4000").bandwidth is None


def test_an_unknown_chip_names_the_nearest() -> None:
    with pytest.raises(PlanError, match="got orin-nano") as error:
        chip("orin-nano")
    assert error.value.hint is not None and "jetson-orin-nano-8gb" in error.value.hint


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        (("schema",), 2, "schema: expected 1, got 2"),
        (("memory",), 64, "memory: expected an object, got 64"),
        (("memory", "source"), "", "memory.source: expected text, got ''"),
        (("memory", "value"), -1, "memory.value: expected a number above 0 up to inf, got -1"),
        (("reserved",), None, "reserved: expected a number with its source, got None"),
        (("reserved", "value"), 1.5, "reserved.value: expected a number above 0 up to 0.9"),
        (("sm",), "87", "sm: expected null or int above 0, got '87'"),
        (("kind",), "phone", "kind: expected text like jetson|rtx|aipc|cpu"),
        (("devices",), {}, "devices: expected at least one"),
        (("devices", "TPU"), {}, "devices: expected no key 'TPU'"),
        (("devices", "GPU", "roofline"), {"bandwidth": 1}, "GPU.roofline: expected key 'layer'"),
        (("power_modes", "value"), [0], "power_modes.value: expected a number above 0"),
    ],
)
def test_a_damaged_profile_is_refused(path: tuple[str, ...], value: Any, message: str) -> None:
    content = copy.deepcopy(ORIN)
    place = content
    for key in path[:-1]:
        place = place[key]
    place[path[-1]] = value
    with pytest.raises(PlanError) as error:
        parse_chip(content, "x.json")
    assert message in error.value.message


def test_a_missing_key_is_refused() -> None:
    content = {key: value for key, value in ORIN.items() if key != "bandwidth"}
    with pytest.raises(PlanError, match="expected key 'bandwidth'"):
        parse_chip(content, "x.json")


def test_the_plan_imports_no_torch() -> None:
    code = "import sys, cpm_edge.benchmarks.plan; sys.exit('torch' in sys.modules or 'click' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_a_profile_is_shown_with_every_source() -> None:
    result = CliRunner().invoke(main, ["chips", "core-ultra-7-358h"])
    assert result.exit_code == 0, result.output
    for text in ("LPDDR5X-9600", "GPU decode", "fit of", "NPU int8, dense", "unverified"):
        assert text in result.stdout, text
    unknown = CliRunner().invoke(main, ["chips", "358h"])
    assert unknown.exit_code == 1 and "expected one of" in unknown.stderr
