"""``cpm-bench run`` on tiny bundles of every engine."""

from __future__ import annotations

import json
from concurrent.futures.process import BrokenProcessPool
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from click.testing import CliRunner

from cpm_edge.benchmarks.bundle.accuracy_file import scored_bundle
from cpm_edge.benchmarks.bundle.measure import Settings, output_hash, random_prompt, repeat_once
from cpm_edge.benchmarks.bundle.record import read_record
from cpm_edge.benchmarks.bundle.run import parse_format
from cpm_edge.benchmarks.bundle.yardstick import another_chip, crowded, find_chip, find_device, other_memory
from cpm_edge.benchmarks.cli import main
from cpm_edge.benchmarks.errors import BenchError
from cpm_edge.benchmarks.plan.catalog import chip as chip_called
from cpm_edge.benchmarks.plan.detect import Signs
from cpm_edge.benchmarks.plan.storage import Format
from cpm_edge.runtimes.bundle import open_bundle
from tests.benchmarks.bundle.browser import BROWSER, looked_at
from tests.support.bundles import NATIVE

if TYPE_CHECKING:
    from tests.support.bundles import Bundles

CASES: list[tuple[str, str, dict[str, Any]]] = [
    ("sparse", "aipc", NATIVE),
    ("sparse", "aipc", {"flavour": "stock"}),
    ("llama", "ort", {"weight_format": "int8"}),
]
QUICK = ("run", "--context", "8", "--new-tokens", "2", "--repeat", "1", "--chip", "ddr5-laptop")


@pytest.mark.parametrize(("variant", "target", "options"), CASES, ids=["native", "stock", "ort"])
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
    page = files["html"].read_text()
    assert page.count("<svg") == 4 and "| 40 |" in files["md"].read_text()
    if BROWSER is not None:
        shown = looked_at(tmp_path, page, 390)
        assert shown["errors"] == [] and shown["requests"] == 0
        assert shown["width"] <= shown["window"] == 390
        assert min(shown["sizes"]) > 300


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


def accuracy_of(bundle: Path) -> dict[str, Any]:
    """As cpm-bench accuracy writes it."""
    results = {
        "perplexity": 10.9, "reference_perplexity": 10.4, "kl": 0.05, "top1": 0.9, "tokens": 2048,
        "greedy": {"summary": "all the same"}, "reference": "tiny", "text": "book.txt",
        "bundle": scored_bundle(open_bundle(bundle).manifest),
    }  # fmt: skip
    return {"benchmark": "accuracy", "schema": 1, "results": results}


def test_accuracy_is_part_of_the_report(bundles: Bundles, tmp_path: Path) -> None:
    folder = bundles.result("sparse", "aipc", **NATIVE).folder
    file, page = tmp_path / "accuracy.json", tmp_path / "run.html"
    file.write_text(json.dumps(accuracy_of(folder)))
    result = CliRunner().invoke(main, [*QUICK, str(folder), "--accuracy", str(file), "-o", str(page)])
    assert result.exit_code == 0, result.output
    assert "10.900, the reference&#x27;s 10.400" in page.read_text()


@pytest.mark.parametrize(
    ("path", "value", "words"),
    [
        (("benchmark",), "run", "expected the JSON of cpm-bench accuracy"),
        (("schema",), 99, "schema 99 is newer than this version reads"),
        (("results",), [], "results: expected an object, got []"),
        (("results", "perplexity"), "abc", "results.perplexity: expected a number from 0 on, got 'abc'"),
        (("results", "kl"), None, "results.kl: expected a number from 0 on, got None"),
        (("results", "top1"), [1], "results.top1: expected a number from 0 on, got [1]"),
        (("results", "greedy"), None, "results.greedy.summary: expected text, got None"),
        (("results", "bundle"), None, "results.bundle: expected what was scored, got None"),
        (("results", "bundle", "target"), "ort", "of this bundle: target aipc, got ort"),
        (("results", "bundle", "files"), "0", "of this bundle: files "),
    ],
)
def test_an_accuracy_file_of_something_else(
    bundles: Bundles, tmp_path: Path, path: tuple[str, ...], value: Any, words: str
) -> None:
    folder = bundles.result("sparse", "aipc", **NATIVE).folder
    content = accuracy_of(folder)
    place: Any = content
    for key in path[:-1]:
        place = place[key]
    place[path[-1]] = value
    file = tmp_path / "accuracy.json"
    file.write_text(json.dumps(content))
    result = CliRunner().invoke(main, [*QUICK, str(folder), "--accuracy", str(file)])
    assert result.exit_code == 1 and words in result.stderr


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--seconds", "nan"], "--seconds: expected a number of seconds, got nan"),
        (["--chip", ""], "--chip: expected an id, auto or this-machine"),
        (["-o", "same", "--json", "./same"], "expected a file of its own for each"),
    ],
)
def test_options_that_make_no_sense(bundles: Bundles, options: list[str], words: str) -> None:
    folder = bundles.result("sparse", "aipc", **NATIVE).folder
    result = CliRunner().invoke(main, ["run", str(folder), *options])
    assert result.exit_code == 2 and words in result.stderr


@pytest.mark.parametrize(("share", "told"), [(0.5, True), (0.9, False), (1.1, False), (1.7, True)])
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
        find_chip("jetson-orin-nx-16gb", "CPU")
    assert find_device(chip_called("jetson-orin-nx-16gb"), "cuda").name.startswith("Ampere")
    assert find_device(chip_called("core-ultra-7-258v"), "GPU.0").name.startswith("Arc")


def test_a_device_that_no_profile_names_is_measured_without_predictions(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("CPM_EDGE_CACHE", str(tmp_path))
    monkeypatch.setattr("cpm_edge.benchmarks.plan.this_machine._measured", lambda: (2e10, 1e11))
    card = Signs(processor="Some CPU", gpus=("NVIDIA GeForce RTX 4060 Laptop GPU",))
    monkeypatch.setattr(import_module("cpm_edge.benchmarks.plan.detect"), "read_signs", lambda root: card)
    assert find_chip("auto", "cuda").id == "rtx-4060-laptop"
    assert find_chip("auto", "CPU").id == "this-machine"
    unlisted = find_chip("auto", "GPU")
    assert (unlisted.id, unlisted.bandwidth, list(unlisted.devices)) == ("unknown", None, ["GPU"])


@pytest.mark.parametrize(
    ("chip", "device"),
    [("core-ultra-7-155h", "cuda"), ("rtx-4090-laptop", "GPU"), ("core-ultra-7-155h", "GPU.1")],
)
def test_an_nvidia_gpu_is_not_the_integrated_one(chip: str, device: str) -> None:
    with pytest.raises(BenchError, match=f"expected a chip whose profile has a {device}"):
        find_chip(chip, device)


def test_a_killed_process_is_an_error_of_ours(bundles: Bundles, monkeypatch: pytest.MonkeyPatch) -> None:
    class Killed:
        def __init__(self, *_: object, **__: object) -> None: ...

        def __enter__(self) -> Killed:
            raise BrokenProcessPool

        def __exit__(self, *_: object) -> None: ...

    monkeypatch.setattr("cpm_edge.benchmarks.bundle.measure.ProcessPoolExecutor", Killed)
    folder = bundles.result("sparse", "aipc", **NATIVE).folder
    result = CliRunner().invoke(main, [*QUICK, str(folder)])
    assert result.exit_code == 1 and "was killed, probably for memory" in result.stderr


def test_more_threads_than_cores_are_told() -> None:
    few, many = (Settings((32,), 4, threads, "CPU", 1, 0) for threads in (1, 4096))
    assert crowded(few) == [] and "4096 threads on" in crowded(many)[0]


def test_another_chip_than_this_machine_s_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    def looks_like(processor: str) -> None:
        monkeypatch.setattr(
            "cpm_edge.benchmarks.bundle.yardstick.read_signs", lambda: Signs(processor=processor)
        )

    chip = chip_called("core-ultra-7-258v")
    looks_like("Intel(R) Core(TM) Ultra 7 258V")
    assert another_chip(chip, "CPU") == []
    looks_like("Intel(R) Core(TM) Ultra 7 155H")
    assert "this machine's chip seems to be Core Ultra 7 155H" in another_chip(chip, "CPU")[0]
    looks_like("AMD EPYC")
    assert "seems to be AMD EPYC" in another_chip(chip, "CPU")[0]
    card = Signs(processor="Intel(R) Core(TM) Ultra 7 258V", gpus=("NVIDIA GeForce RTX 4060 Laptop GPU",))
    monkeypatch.setattr("cpm_edge.benchmarks.bundle.yardstick.read_signs", lambda: card)
    assert another_chip(chip, "GPU") == [] and another_chip(chip_called("rtx-4060-laptop"), "cuda") == []
    assert (
        another_chip(chip_called("ddr5-laptop"), "CPU") == []
    )  # a kind of machine, with no name to look for
