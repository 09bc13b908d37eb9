"""Plans of every published config for every chip, and what they advise."""

from __future__ import annotations

import json
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest

from cpm_edge.benchmarks.plan import PlanError, chips, plan
from cpm_edge.benchmarks.plan.detect import Signs
from cpm_edge.benchmarks.plan.fit import published as load_published
from cpm_edge.benchmarks.plan.shape import ModelShape
from cpm_edge.benchmarks.plan.speed import prompt_operations
from cpm_edge.benchmarks.plan.text import rows, to_json
from cpm_edge.exporter.registry import find_architecture
from tests.source_tree import ROOT

CONFIGS = sorted((ROOT / "tests/data/configs").glob("*.json"))
EIGHT = ROOT / "tests/data/configs/minicpm4-8b.json"
LIBRARIES = 60e6  # bytes of libraries by which installations differ: more than a tenth of the smallest model
# Peak of a process (VmHWM), bytes, measured with two threads: config, target, flavour, context.
MEASURED = [
    ("minicpm4-0.5b", "aipc", "native", 512, 396 << 20),
    ("minicpm4-0.5b", "aipc", "native", 2048, 417 << 20),
    ("minicpm4-0.5b", "aipc", "stock", 512, 804 << 20),
    ("minicpm4-0.5b", "aipc", "stock", 2048, 899 << 20),
    ("minicpm4-0.5b", "ort", "", 512, 513 << 20),
    ("minicpm4-0.5b", "ort", "", 2048, 568 << 20),
    ("minicpm4-8b", "aipc", "native", 256, 4519 << 20),
    ("minicpm4-8b", "aipc", "stock", 256, 9787 << 20),
    ("minicpm4-8b", "ort", "", 256, 6978 << 20),
    ("smollm2-135m", "aipc", "native", 2048, 241 << 20),
    ("smollm2-135m", "aipc", "stock", 1024, 411 << 20),
    ("smollm2-135m", "ort", "", 1024, 260 << 20),
    # Of cpm-bench run, which holds its own modules too, in three installations.
    ("minicpm4-0.5b", "aipc", "native", 544, 446_000_000),
    ("minicpm4-0.5b", "aipc", "native", 544, 476_000_000),
    ("minicpm4-0.5b", "aipc", "native", 544, 498_100_000),
    ("minicpm4-0.5b", "aipc", "stock", 544, 899_000_000),
    ("minicpm4-0.5b", "aipc", "stock", 544, 923_400_000),
    ("minicpm4-0.5b", "ort", "", 544, 571_000_000),
    ("minicpm4-0.5b", "ort", "", 544, 613_200_000),
    ("smollm2-135m", "aipc", "native", 544, 244_000_000),
    ("smollm2-135m", "aipc", "native", 544, 269_200_000),
    ("smollm2-135m", "aipc", "stock", 544, 471_000_000),
    ("smollm2-135m", "aipc", "stock", 544, 502_000_000),
    ("smollm2-135m", "ort", "", 544, 278_000_000),
    ("smollm2-135m", "ort", "", 544, 293_800_000),
]


@pytest.mark.parametrize("config", CONFIGS, ids=lambda path: path.stem)
def test_every_chip_has_an_answer(config: Path) -> None:
    for chip in chips().values():
        answer = plan(config, chip)
        assert answer.memory.total == sum(
            (answer.memory.weights, answer.memory.cache, answer.memory.workspace, answer.memory.base)
        )
        assert answer.fits is (None if chip.memory is None else answer.memory.total <= (answer.usable or 0))
        assert answer.speeds and all(value for _, value in rows(answer))
        for speed in to_json(answer)["speeds"]:
            pair = speed["decode_tokens_per_second"]
            assert pair is None or pair["low"] is None or pair["low"] < pair["high"] < 1.51 * pair["low"]
        if answer.fits is False:
            assert all(each.option for each in answer.advice)


@pytest.mark.parametrize(("config", "target", "flavour", "context", "peak"), MEASURED)
def test_memory_is_within_a_tenth_of_a_measured_process(
    config: str, target: str, flavour: str, context: int, peak: int
) -> None:
    answer = plan(
        ROOT / f"tests/data/configs/{config}.json", "core-ultra-7-258v", target=target, flavour=flavour,
        context=context, device="CPU",
    )  # fmt: skip
    small = LIBRARIES if config.startswith("smollm2") else 0.0
    assert answer.memory.total == pytest.approx(peak, rel=0.1, abs=small)


@pytest.mark.parametrize(
    ("model", "published"),
    [("Qwen3-0.6B", 1931e6), ("Qwen3-1.7B", 3302e6), ("Qwen3-4B", 4911e6), ("Qwen3-8B", 8221e6)],
)
def test_memory_on_a_jetson_is_that_of_a_published_engine(model: str, published: float) -> None:
    config = load_published()["models"][model]
    answer = plan(config, "jetson-agx-orin-64gb", context=4096, group_size=128, head_format="fp16")
    # Theirs keeps the embedding on the GPU, ours reads the rows of tokens from the file.
    table = 2 * config["vocab_size"] * config["hidden_size"]
    assert answer.memory.total + 1.14 * table == pytest.approx(published, rel=0.05)


@pytest.mark.parametrize(
    ("target", "flavour", "peak", "verified"),
    [("ort", "", 571e6, 1593e6), ("aipc", "stock", 884e6, 1952e6), ("aipc", "native", 880e6, 1616e6)],
)
def test_memory_of_an_export_is_within_a_tenth_of_a_measured_one(
    target: str, flavour: str, peak: float, verified: float
) -> None:
    config = ROOT / "tests/data/configs/minicpm4-0.5b.json"
    found = plan(config, "core-ultra-7-258v", target=target, flavour=flavour, device="CPU").export
    assert found.memory == pytest.approx(peak, rel=0.1)
    assert found.verified == pytest.approx(verified, rel=0.1)


def test_advice_makes_it_fit() -> None:
    answer = plan(EIGHT, "jetson-orin-nano-8gb", weight_format="int8", context=8192)
    assert answer.fits is False
    assert next(each.option for each in answer.advice) == "--weight-format int4"
    assert plan(EIGHT, "jetson-orin-nano-8gb", weight_format="int4", context=8192).fits
    for change in answer.advice:
        assert change.option.startswith("--chip") or change.total <= (answer.usable or 0)


def test_the_longest_context_that_fits_is_advised() -> None:
    asked: dict[str, Any] = {"memory": int(6.2e9), "flavour": "native"}
    answer = plan(EIGHT, "core-ultra-7-258v", **asked)
    shorter = next(each.option for each in answer.advice if each.option.startswith("--max-context"))
    tokens = int(shorter.split()[1])
    assert plan(EIGHT, "core-ultra-7-258v", context=tokens, **asked).fits
    assert not plan(EIGHT, "core-ultra-7-258v", context=tokens + 256, **asked).fits


def test_two_changes_where_one_is_not_enough() -> None:
    answer = plan(EIGHT, "core-ultra-7-258v", memory=int(7.5e9), device="CPU", weight_format="int8")
    assert answer.advice and any(" and " in each.option for each in answer.advice)


def test_three_changes_and_a_shorter_context() -> None:
    asked: dict[str, Any] = {"memory": int(6.2e9), "device": "CPU", "weight_format": "fp16"}
    answer = plan(EIGHT, "core-ultra-7-258v", **asked)
    (change,) = answer.advice
    *options, context = change.option.split(" and ")
    assert options == ["--flavour native", "--weight-format int4"] and context.startswith("--max-context")
    tokens = int(context.split()[1])
    changed = {**asked, "flavour": "native", "weight_format": "int4"}
    assert plan(EIGHT, "core-ultra-7-258v", **changed, context=tokens).fits
    assert not plan(EIGHT, "core-ultra-7-258v", **changed, context=tokens + 256).fits


def test_another_chip_is_a_larger_one() -> None:
    for chip in chips().values():
        answer = plan(EIGHT, chip, weight_format="fp16", flavour="stock")
        for change in answer.advice:
            if change.option.startswith("--chip"):
                other = chips()[change.option.split()[1]]
                assert (other.memory_bytes or 0) > (chip.memory_bytes or 0)


def test_memory_that_differs_is_unverified_until_it_is_said() -> None:
    assert plan(EIGHT, "core-ultra-7-358h").fits is None
    assert dict(rows(plan(EIGHT, "core-ultra-7-358h")))["fits"].startswith("unverified")
    assert plan(EIGHT, "core-ultra-7-358h", memory=32 << 30).fits is True


def test_sparse_attention_is_planned_beside_dense() -> None:
    answer = plan(EIGHT, "jetson-agx-orin-64gb", attention="sparse", context=32768)
    kinds = [(each.context, each.attention) for each in answer.speeds]
    assert kinds == [(512, "dense"), (32768, "dense"), (32768, "sparse")]
    dense, sparse = (each.decode.rate for each in answer.speeds[1:])
    assert dense is not None and sparse is not None and sparse.high > dense.high


@pytest.mark.parametrize(
    ("config", "parameters"),
    [
        ("minicpm4-8b", 8.19e9),
        ("minicpm3-4b", 4.07e9),
        ("minicpm-moe-8x2b", 13.87e9),
        ("minicpm-sala", 9.48e9),
    ],
)
def test_parameters(config: str, parameters: float) -> None:
    shape = ModelShape.read(ROOT / f"tests/data/configs/{config}.json")
    assert shape.parameters == pytest.approx(parameters, rel=1e-3)


@pytest.mark.parametrize(
    ("chip", "asked", "message"),
    [
        ("jetson-agx-orin-64gb", {"target": "aipc"}, "expected a chip for target aipc"),
        ("core-ultra-7-258v", {"target": "jetson"}, "expected a chip for target jetson"),
        ("jetson-agx-orin-64gb", {"device": "NPU"}, "--device: expected one of GPU"),
        ("core-ultra-7-258v", {"context": 1 << 30}, "--max-context: expected at most 32768"),
    ],
)
def test_questions_that_make_no_sense(chip: str, asked: dict[str, Any], message: str) -> None:
    with pytest.raises(PlanError, match=message):
        plan(EIGHT, chip, **asked)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({}, "architectures: expected one of"),
        ({"architectures": ["LlamaForCausalLM"]}, "hidden_size: expected a whole number above 0, got None"),
        ("nowhere", "expected a config.json"),
    ],
)
def test_configs_that_cannot_be_planned(config: object, message: str) -> None:
    with pytest.raises(PlanError, match=message):
        plan(config, "jetson-agx-orin-64gb")  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        ({"context": -5}, "--max-context: expected a number above 0, got -5"),
        ({"memory": 0}, "--memory: expected a number above 0, got 0"),
        ({"flavour": "nativ"}, "--flavour: expected one of stock, native, got nativ"),
        ({"flavour": "native", "device": "GPU"}, "--device: the native flavour runs on the CPU, got GPU"),
        ({"target": "ort", "device": "NPU"}, "--device: ort bundles run on the CPU, got NPU"),
    ],
)
def test_questions_without_an_answer(asked: dict[str, Any], message: str) -> None:
    with pytest.raises(PlanError) as error:
        plan(EIGHT, "core-ultra-7-258v", **asked)
    assert message in str(error.value)


def test_memory_that_was_said_stays_with_every_chip() -> None:
    answer = plan(EIGHT, "core-ultra-7-258v", memory=int(5e9), device="CPU", weight_format="int8")
    assert answer.fits is False
    assert not any("--chip" in each.option for each in answer.advice)


def test_this_machine_is_a_chip(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("CPM_EDGE_CACHE", str(tmp_path))
    monkeypatch.setattr("cpm_edge.benchmarks.plan.this_machine._measured", lambda: (2e10, 1e11))
    assert plan(EIGHT, "this-machine").chip.id == "this-machine"


@pytest.mark.parametrize(("target", "chip"), [("aipc", "rtx-4060-laptop"), ("ort", "jetson-orin-nx-16gb")])
def test_no_nvidia_gpu_runs_openvino_or_onnxruntime(target: str, chip: str) -> None:
    with pytest.raises(PlanError, match=f"expected a chip for target {target}"):
        plan(EIGHT, chip, target=target)


def test_a_machine_without_a_known_gpu_is_asked_for_its_chip(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("CPM_EDGE_CACHE", str(tmp_path))
    monkeypatch.setattr("cpm_edge.benchmarks.plan.this_machine._measured", lambda: (2e10, 1e11))
    signs = Signs(processor="Some CPU")
    monkeypatch.setattr(import_module("cpm_edge.benchmarks.plan.detect"), "read_signs", lambda root: signs)
    with pytest.raises(PlanError, match="--target rtx: expected a machine whose rtx chip a profile names"):
        plan(EIGHT, target="rtx")


def test_no_prediction_is_above_what_the_memory_allows() -> None:
    for config in CONFIGS:
        for chip in chips().values():
            answer = plan(config, chip)
            if chip.bandwidth is None:
                continue
            for speed in answer.speeds:
                rate = speed.decode.rate
                if rate is not None:
                    assert rate.high <= 1.0001 * chip.bandwidth.value / answer.weights.read


def test_a_dynamic_context_is_the_one_that_is_exported() -> None:
    config = json.loads((ROOT / "tests/data/configs/smollm2-135m.json").read_text())
    config["rope_scaling"] = {"type": "dynamic", "factor": 2.0}
    positions = config["max_position_embeddings"]
    assert plan(config, "core-ultra-7-258v").context == 2 * positions
    parsed = find_architecture(config).config.from_dict(config)
    assert parsed.max_context == 2 * positions
    config["rope_scaling"]["factor"] = "2"
    with pytest.raises(PlanError, match=r"rope_scaling\.factor"):
        plan(config, "core-ultra-7-258v")


def test_attention_that_is_always_sparse_is_no_more_than_dense() -> None:
    config = json.loads(EIGHT.read_text())
    config["sparse_config"] = {"dense_len": -1}
    always = ModelShape.read(config)
    dense = always.with_attention("dense")
    for tokens in (128, 4096):
        scores = prompt_operations(always, tokens) / prompt_operations(dense, tokens)
        assert 1 <= scores < 1.02  # the pooled keys come on top
    assert prompt_operations(always, 65536) < 0.8 * prompt_operations(dense, 65536)


def test_sizes_of_blocks_that_make_no_sense() -> None:
    config = json.loads(EIGHT.read_text())
    config["sparse_config"] = {"block_size": 0}
    with pytest.raises(
        PlanError, match=r"sparse_config\.block_size: expected a whole number from 1 on, got 0"
    ):
        plan(config, "core-ultra-7-258v")


def test_advice_can_be_followed() -> None:
    answer = plan(EIGHT, "core-ultra-7-258v", device="CPU", kv_cache="fp32", memory=int(8e9))
    assert answer.fits is False
    assert any(change.option.startswith("--flavour native and --kv-cache fp16") for change in answer.advice)
