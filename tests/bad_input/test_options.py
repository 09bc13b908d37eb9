from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.bad_input.bench import QUESTION, Bench
from tests.support.checkpoints import VARIANTS, make_tensors, write_checkpoint


@pytest.mark.parametrize(
    ("arguments", "words", "hint"),
    [
        (["--max-context", "1025"], ["--max-context: expected at most 1024", "got 1025"], "rope_scaling"),
        (["--weight-format", "fp16", "--group-size", "64"], ["group size 64", "fp16"], "choose int4"),
        (["--weight-format", "int8", "--asym"], ["asymmetric", "int8"], "choose int4"),
        (
            ["--attention", "sparse"],
            ["--attention sparse", "InfLLM-V2", "got llama"],
            "leave --attention out",
        ),
        (["--kv-cache", "int8"], ["--kv-cache: expected fp32", "got int8"], "--target aipc"),
        (["--kv-cache", "fp16"], ["--kv-cache: expected fp32", "got fp16"], "--target aipc"),
    ],
)
def test_options_that_do_not_go_together(
    bench: Bench, arguments: list[str], words: list[str], hint: str
) -> None:
    bench.export_fails(*arguments).says(*words, hint=hint)


def test_formats_that_differ_for_one_tied_tensor(bench: Bench) -> None:
    config = VARIANTS["tied-mha"]
    tied = write_checkpoint(bench.root / "tied", config, make_tensors(config))
    refusal = bench.export_fails("--embedding-format", "fp16", "--head-format", "int8", model=tied)
    refusal.says("one tensor", "fp16", "int8", hint="one of them")


def test_columns_that_no_group_divides(bench: Bench) -> None:
    config = VARIANTS["llama"] | {"intermediate_size": 80, "num_hidden_layers": 1}
    odd = write_checkpoint(bench.root / "odd", config, make_tensors(config))
    refusal = bench.export_fails(model=odd)
    refusal.says("mlp.down_proj.weight", "80 columns", "32", hint="--weight-format int8")


def test_an_int8_cache_for_sparse_attention(bench: Bench) -> None:
    config = VARIANTS["sparse"]
    sparse = write_checkpoint(bench.root / "sparse", config, make_tensors(config))
    refusal = bench.export_fails("--kv-cache", "int8", model=sparse, target="aipc")
    refusal.says("--kv-cache", "sparse attention", "got int8", hint="--attention dense")


def test_a_latent_cache_takes_no_other_format(bench: Bench) -> None:
    config = VARIANTS["minicpm3"]
    latent = write_checkpoint(bench.root / "latent", config, make_tensors(config))
    refusal = bench.export_fails("--kv-cache", "fp16", model=latent, target="aipc")
    refusal.says("--kv-cache", "expected fp32 for latent attention", "got fp16", hint="leave --kv-cache out")
    refusal = bench.export_fails("--kv-cache", "int8", "--flavour", "native", model=latent, target="aipc")
    refusal.says("--kv-cache", "expected fp16 in the native flavour", "got int8", hint="leave --kv-cache out")
    refusal = bench.export_fails("--attention", "sparse", model=latent)
    refusal.says("--attention sparse", "InfLLM-V2", "got minicpm3", hint="leave --attention out")


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"v_head_dim": 8}, ["v_head_dim to be a multiple of 16", "got 8"]),
        ({"qk_rope_head_dim": 12}, ["qk_rope_head_dim to be a multiple of 8", "got 12"]),
        ({"kv_lora_rank": 44}, ["kv_lora_rank a scale to be a multiple of 8", "got 44"]),
    ],
)
def test_latent_sizes_that_the_native_kernel_lacks(
    bench: Bench, changes: dict[str, int], words: list[str]
) -> None:
    config = VARIANTS["minicpm3-untied"] | changes
    latent = write_checkpoint(bench.root / "latent", config, make_tensors(config))
    options = ("--flavour", "native", "--weight-format", "int8")
    bench.export_fails(*options, model=latent, target="aipc").says("native flavour", *words, hint="stock")


def test_json_keeps_errors_on_stderr(bench: Bench) -> None:
    # export_fails checks that stdout is empty.
    bench.export_fails("--json", "--max-context", "1025").says("--max-context", hint="rope_scaling")
    result = bench.export("--json")
    assert json.loads(result.stdout)["output"] == str(bench.output)
    assert result.stderr == ""


@pytest.mark.parametrize(
    "arguments",
    [
        ["--target", "toaster"],
        ["--weight-format", "int3"],
        ["--group-size", "48"],
        ["--max-context", "0"],
        ["--kv-cache", "int2"],
        ["--no-such-option"],
        ["surplus"],
    ],
)
def test_wrong_usage_of_cpm_export_exits_with_2(bench: Bench, arguments: list[str]) -> None:
    before = bench.files()
    result = bench.export(*arguments)
    assert result.exit_code == 2
    assert arguments[0] in result.stderr or "surplus" in result.stderr
    assert "Usage:" in result.stderr
    assert (result.stdout, bench.files()) == ("", before)


@pytest.mark.parametrize("arguments", [["--threads", "0"], ["--max-context", "0"], ["--temperature", "-1"]])
def test_wrong_usage_of_cpm_run_exits_with_2(bench: Bench, bundle: Path, arguments: list[str]) -> None:
    result = bench.run(bundle, *QUESTION, *arguments)
    assert result.exit_code == 2
    assert arguments[0] in result.stderr
    assert result.stdout == ""


@pytest.mark.parametrize(
    ("target", "device", "words", "hint"),
    [
        ("ort", "TOASTER", ["expected CPU or cuda", "got TOASTER"], "--device CPU"),
        ("ort", "NPU", ["expected CPU or cuda", "got NPU"], "--device CPU"),
        ("ort", "cuda", ["cuda", "onnxruntime has no CUDAExecutionProvider"], "ort-gpu"),
        ("aipc", "TOASTER", ["expected CPU or GPU", "got TOASTER"], "--device CPU"),
        ("aipc", "NPU", ["expected CPU or GPU", "got NPU"], "LLMPipeline"),
        ("aipc", "GPU", ["GPU", "OpenVINO finds CPU"], "--device CPU"),
    ],
)
def test_devices(bench: Bench, target: str, device: str, words: list[str], hint: str) -> None:
    assert bench.export(target=target).exit_code == 0
    if device == "GPU" and "GPU" in _openvino_devices():
        pytest.skip("this machine has an Intel GPU")
    bench.run_fails(bench.output, *QUESTION, "--device", device).says(*words, hint=hint)


def _openvino_devices() -> list[str]:
    import openvino

    return [name.split(".")[0] for name in openvino.Core().available_devices]


def test_json_of_cpm_run_keeps_errors_on_stderr(bench: Bench, bundle: Path) -> None:
    bench.run_fails(bundle, *QUESTION, "--json", "--device", "NPU").says("NPU", hint="--device CPU")
