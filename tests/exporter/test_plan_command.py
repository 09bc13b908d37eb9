"""``cpm-export --plan`` as a user calls it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from cpm_edge.benchmarks.random_checkpoint import write_checkpoint
from cpm_edge.benchmarks.shape import Shape
from cpm_edge.exporter.cli import main
from tests.benchmarks.shapes import write_shape
from tests.source_tree import ROOT

CONFIGS = ROOT / "tests/data/configs"


def run(*arguments: str) -> Result:
    return CliRunner().invoke(main, arguments, env={"COLUMNS": "200", "NO_COLOR": "1"})


def test_a_plan_needs_the_config_alone(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text((CONFIGS / "minicpm4-8b.json").read_text())
    result = run("-m", str(tmp_path), "--plan", "--chip", "jetson-agx-orin-64gb")
    assert result.exit_code == 0, result.stderr
    for text in ("weight file      4.87 GB", "1.07 GB for 32768 tokens", "tok/s", "fits             yes"):
        assert text in result.stdout
    assert [path.name for path in tmp_path.iterdir()] == ["config.json"]


def test_what_does_not_fit_is_refused_with_changes() -> None:
    result = run(
        "-m", str(CONFIGS / "minicpm4-8b.json"), "--plan", "--chip", "jetson-orin-nano-8gb",
        "--weight-format", "int8", "--json",
    )  # fmt: skip
    assert result.exit_code == 1
    assert json.loads(result.stdout)["fits"] is False
    assert result.stderr.startswith("error: does not fit: it takes ")
    assert "hint: one of: --weight-format int4" in result.stderr


def test_options_of_an_export_hold_for_its_plan() -> None:
    common = ("-m", str(CONFIGS / "minicpm4-8b.json"), "--plan", "--chip", "core-ultra-7-258v", "--json")
    usual = json.loads(run(*common).stdout)
    other = json.loads(run(*common, "--group-size", "128", "--kv-cache", "int8", "--flavour", "native",
                           "--max-context", "4096").stdout)  # fmt: skip
    assert (usual["formats"]["linear"], other["formats"]["linear"]) == ("int4 g32 sym", "int4 g128 sym")
    assert (other["device"], other["cache_bytes"]["format"], other["context"]) == ("CPU", "int8", 4096)
    assert other["weight_file_bytes"]["total"] < usual["weight_file_bytes"]["total"]


def test_wrong_questions(tmp_path: Path) -> None:
    config = str(CONFIGS / "minicpm4-8b.json")
    unknown = run("-m", config, "--plan", "--chip", "orin-nano")
    assert unknown.exit_code == 1 and "did you mean jetson-orin-nano-8gb" in unknown.stderr
    assert "expected a config.json" in run("-m", str(tmp_path), "--plan", "--chip", "ddr5-laptop").stderr
    lonely = run("-m", config, "-t", "ort", "-o", str(tmp_path / "x"), "--chip", "ddr5-laptop")
    assert lonely.exit_code == 2 and "together with --plan" in lonely.stderr
    assert "Missing option '-t'" in run("-m", config).stderr
    assert "Missing option '-o'" in run("-m", config, "-t", "ort").stderr


def test_a_jetson_has_no_kernels_for_latent_attention() -> None:
    common = ("-m", str(CONFIGS / "minicpm3-4b.json"), "--plan", "--chip", "jetson-orin-nx-16gb")
    usual, stock = run(*common), run(*common, "--flavour", "stock")
    assert usual.exit_code == stock.exit_code == 0
    assert "warning: the export needs --flavour stock" in usual.stderr and not stock.stderr
    native = run(*common, "--flavour", "native")
    assert native.exit_code == 1 and "got latent attention" in native.stderr


def test_what_an_export_refuses_is_not_planned(tmp_path: Path) -> None:
    config = json.loads((CONFIGS / "minicpm4-8b.json").read_text())
    config["quantization_config"] = {"quant_method": "bitsandbytes", "load_in_4bit": True}
    (tmp_path / "config.json").write_text(json.dumps(config))
    result = run("-m", str(tmp_path), "--plan", "--chip", "jetson-agx-orin-64gb")
    assert result.exit_code == 1 and "expected gptq or awq with 4 bits, got bitsandbytes" in result.stderr
    wide = run("-m", str(CONFIGS / "minicpm4-8b.json"), "--plan", "--chip", "jetson-agx-orin-64gb",
               "--weight-format", "bf16")  # fmt: skip
    assert wide.exit_code == 1 and "--weight-format: expected fp16, int8, int4 or ternary" in wide.stderr


def test_a_plan_as_json_tells_where_its_numbers_are_from() -> None:
    result = run("-m", str(CONFIGS / "minicpm4-8b.json"), "--plan", "--chip", "jetson-orin-nx-16gb", "--json")
    sources = json.loads(result.stdout)["sources"]
    assert sources["bandwidth"] == {"value": 102.4e9, "source": sources["bandwidth"]["source"]}
    assert "TensorRT-Edge-LLM" in sources["decode"]["source"] and sources["fp16"] is None


def test_auto_is_what_the_weights_are(tmp_path: Path) -> None:
    model = tmp_path / "model"
    write_checkpoint(Shape.open(str(write_shape(tmp_path))), model, ternary=True)
    common = ("--plan", "--chip", "core-ultra-7-258v", "--json")
    assert json.loads(run("-m", str(model), *common).stdout)["formats"]["linear"] == "ternary g128"
    for weights in model.glob("*.safetensors"):
        weights.unlink()
    assert json.loads(run("-m", str(model), *common).stdout)["formats"]["linear"] == "int4 g32 sym"


def test_what_calibration_takes_is_said_not_to_be_counted() -> None:
    common = ("-m", str(CONFIGS / "minicpm4-8b.json"), "--plan", "--chip", "core-ultra-7-258v")
    assert "memory is without that of calibration" in run(*common, "--method", "gptq").stderr
    assert not run(*common).stderr


def test_what_a_plan_warns_of_is_one_line(tmp_path: Path) -> None:
    config = json.loads((CONFIGS / "minicpm4-8b.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "mystery": 1}))
    result = run("-m", str(tmp_path), "--plan", "--chip", "jetson-agx-orin-64gb")
    assert result.exit_code == 0
    assert result.stderr == "warning: config.json: keys without effect here: mystery\n"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--memory", "nan"], "--memory: expected 0.01 to 1e+06 gigabytes, got nan"),
        (["--memory", "1e-12"], "--memory: expected 0.01 to 1e+06 gigabytes, got 1e-12"),
        (["--chip", ""], "--chip: expected an id, auto or this-machine"),
        (["--ratio", "0.5"], "only the calibration tells which matrices become int8"),
    ],
)
def test_what_cannot_be_planned(options: list[str], message: str) -> None:
    result = run("-m", str(CONFIGS / "minicpm4-8b.json"), "--plan", "--chip", "ddr5-laptop", *options)
    assert result.exit_code == 1 and message in result.stderr
