"""``cpm-bench run`` on tiny bundles of every engine."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from click.testing import CliRunner

from cpm_edge.benchmarks.bundle.measure import Settings, output_hash, random_prompt, repeat_once
from cpm_edge.benchmarks.bundle.record import read_record
from cpm_edge.benchmarks.bundle.run import parse_format
from cpm_edge.benchmarks.bundle.yardstick import another_chip, find_device, other_memory
from cpm_edge.benchmarks.cli import main
from cpm_edge.benchmarks.errors import BenchError
from cpm_edge.benchmarks.plan.catalog import chip as chip_called
from cpm_edge.benchmarks.plan.detect import Signs
from cpm_edge.benchmarks.plan.storage import Format
from tests.support.bundles import NATIVE

if TYPE_CHECKING:
    from tests.support.bundles import Bundles

CASES: list[tuple[str, str, dict[str, Any]]] = [
    ("sparse", "aipc", NATIVE),
    ("llama", "ort", {"weight_format": "int8"}),
]


@pytest.mark.parametrize(("variant", "target", "options"), CASES, ids=["native", "ort"])
def test_a_run_writes_three_reports(
    bundles: Bundles, tmp_path: Path, variant: str, target: str, options: dict[str, Any]
) -> None:
    folder = bundles.result(variant, target, **options).folder
    files = {name: tmp_path / f"run.{name}" for name in ("html", "json", "md")}
    result = CliRunner().invoke(
        main,
        ["run", str(folder), "--context", "8,40", "--new-tokens", "5", "--repeat", "2", "--threads", "1",
         "--chip", "ddr5-laptop", "-o", str(files["html"]), "--json", str(files["json"]),
         "--markdown", str(files["md"])],
    )  # fmt: skip
    assert result.exit_code == 0, result.output
    record = read_record(files["json"])
    assert [(at.context, len(at.first), len(at.steps), len(at.hashes)) for at in record.at()] == [
        (8, 2, 8, 1),
        (40, 2, 8, 1),
    ]
    assert record.results["memory"]["predicted"]["total"] > 0
    assert "<svg" in files["html"].read_text() and "| 40 |" in files["md"].read_text()


@pytest.mark.parametrize(("after", "told"), [(26e9, True), (21e9, False)])
def test_a_machine_that_changes_meanwhile_is_told(
    bundles: Bundles, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, after: float, told: bool
) -> None:
    readings = iter([20e9, after])
    monkeypatch.setattr("cpm_edge.benchmarks.bundle.yardstick.read_bandwidth", lambda threads: next(readings))
    folder = bundles.result("sparse", "aipc", **NATIVE).folder
    arguments = ["--context", "8", "--new-tokens", "2", "--repeat", "1", "--chip", "ddr5-laptop"]
    result = CliRunner().invoke(main, ["run", str(folder), *arguments, "--json", str(tmp_path / "run.json")])
    assert result.exit_code == 0, result.output
    written = json.loads((tmp_path / "run.json").read_text())
    assert written["results"]["roofline"]["bandwidth"] == (20e9 + after) / 2
    assert any("20.0 GB/s before" in note for note in written["notes"]) == told


def test_a_context_that_the_bundle_does_not_take(bundles: Bundles) -> None:
    folder = bundles.result("sparse", "aipc", **NATIVE).folder
    arguments = ["run", str(folder), "--context", "100000", "--chip", "ddr5-laptop"]
    result = CliRunner().invoke(main, arguments)
    assert result.exit_code == 1 and "--context: expected at most" in result.stderr


def test_times_are_those_of_the_clock_and_tokens_repeat(bundles: Bundles) -> None:
    engine = bundles.engine("sparse", "aipc", **NATIVE)
    ticking = iter(range(100))
    first = repeat_once(engine, 20, 4, 50, clock=lambda: float(next(ticking)))
    assert (first["first"], first["steps"], len(first["tokens"])) == (1.0, [1.0, 1.0, 1.0], 4)
    assert output_hash(repeat_once(engine, 20, 4, 50)["tokens"]) == output_hash(first["tokens"])
    assert (random_prompt(9, 50) == random_prompt(9, 50)).all()


@pytest.mark.parametrize(
    "form", [Format("int4", 32), Format("int4", 128, symmetric=False), Format("int8"), Format("bf16"),
             Format("ternary", 128)],
)  # fmt: skip
def test_a_manifest_s_words_for_formats(form: Format) -> None:
    assert parse_format(form.describe()) == form


def test_an_accuracy_file_of_something_else(bundles: Bundles, tmp_path: Path) -> None:
    file = tmp_path / "other.json"
    folder = bundles.result("sparse", "aipc", **NATIVE).folder
    for results, words in (
        ({"weights": "bf16", "source": "sparse"}, "sparse in int4 g32 sym, got that of sparse in bf16"),
        ({"weights": "int4 g32 sym", "source": "other"}, "got that of other in int4 g32 sym"),
        ([], "expected the JSON of cpm-bench accuracy"),
    ):
        file.write_text(json.dumps({"benchmark": "accuracy", "results": results}))
        asked = ["run", str(folder), "--chip", "ddr5-laptop", "--accuracy", str(file)]
        result = CliRunner().invoke(main, asked)
        assert result.exit_code == 1 and words in result.stderr


@pytest.mark.parametrize(("share", "told"), [(0.5, True), (0.8, False), (1.2, False), (1.7, True)])
def test_memory_of_another_speed_than_the_profile_s_is_told(share: float, told: bool) -> None:
    chip = chip_called("ddr5-laptop")
    assert chip.bandwidth is not None
    settings = Settings(contexts=(32,), new_tokens=4, threads=None, device="CPU", repeat=1, seconds=0)
    notes = other_memory(share * chip.bandwidth.value, chip, settings)
    assert any("the chip's profile says" in note for note in notes) == told


@pytest.mark.parametrize(
    ("repeat", "rounds", "seconds", "enough"),
    [
        (3, 2, 1e6, False),
        (3, 3, 0.0, True),
        (None, 4, 1e6, False),
        (None, 5, 59.9, False),
        (None, 5, 60.0, True),
        (None, 100, 1.0, True),
    ],
)
def test_rounds_go_on_for_a_while(repeat: int | None, rounds: int, seconds: float, enough: bool) -> None:
    settings = Settings((32,), 4, None, "CPU", repeat, 60.0)
    assert settings.is_enough(rounds, seconds) == enough


def test_a_chip_without_the_device_is_refused() -> None:
    with pytest.raises(BenchError, match="expected a chip whose profile has a CPU, which this run uses"):
        find_device(chip_called("jetson-orin-nx-16gb"), "CPU")
    assert find_device(chip_called("jetson-orin-nx-16gb"), "cuda").name.startswith("Ampere")
    assert find_device(chip_called("core-ultra-7-258v"), "GPU.1").name.startswith("Arc")


def test_another_chip_than_this_machine_s_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    def looks_like(processor: str) -> None:
        monkeypatch.setattr(
            "cpm_edge.benchmarks.bundle.yardstick.read_signs", lambda: Signs(processor=processor)
        )

    chip = chip_called("core-ultra-7-258v")
    looks_like("Intel(R) Core(TM) Ultra 7 258V")
    assert another_chip(chip) == []
    looks_like("Intel(R) Core(TM) Ultra 7 155H")
    assert "this machine's chip seems to be Core Ultra 7 155H" in another_chip(chip)[0]
    looks_like("AMD EPYC")
    assert "seems to be AMD EPYC" in another_chip(chip)[0]
    assert another_chip(chip_called("ddr5-laptop")) == []  # a kind of machine, with no name to look for
