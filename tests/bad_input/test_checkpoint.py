from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from tests.bad_input.bench import INDEX, SHARDS, Bench, parse

QUERY = "model.layers.1.self_attn.q_proj.weight"
NORM = "model.layers.2.input_layernorm.weight"


def test_the_checkpoint_is_fine_as_it_is(bench: Bench) -> None:
    bench.shard()
    result = bench.export()
    assert (result.exit_code, result.stdout) == (0, "")
    assert bench.run(bench.output).exit_code == 0
    assert [path.name for path in bench.output.parent.iterdir()] == [bench.output.name]


def test_a_missing_shard(bench: Bench) -> None:
    bench.shard()
    (bench.checkpoint / SHARDS[1]).unlink()
    bench.export_fails().says(INDEX, SHARDS[1], "missing", hint="download the missing file")


@pytest.mark.parametrize("kept", [0, 4, 300, -1])
def test_a_truncated_shard(bench: Bench, kept: int) -> None:
    bench.shard()
    shard = bench.checkpoint / SHARDS[1]
    data = shard.read_bytes()
    shard.write_bytes(data[:kept])
    size = str(len(data[:kept]))
    bench.export_fails().says(SHARDS[1], size, hint="again")


def test_a_shard_that_is_something_else(bench: Bench) -> None:
    bench.shard()
    (bench.checkpoint / SHARDS[1]).write_bytes(b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n")
    bench.export_fails().says(SHARDS[1], "not a safetensors file", hint="download")


def test_an_index_that_names_a_missing_tensor(bench: Bench) -> None:
    index = bench.shard()
    bench.write_index(index | {"model.layers.9.mlp.up_proj.weight": SHARDS[0]})
    bench.export_fails().says(
        "model.layers.9.mlp.up_proj.weight", SHARDS[0], "no file", hint="different downloads"
    )


def test_an_index_that_leaves_its_folder(bench: Bench) -> None:
    index = bench.shard()
    bench.write_index(index | {QUERY: "../model.safetensors"})
    bench.export_fails().says(INDEX, "expected plain file names", "'../model.safetensors'", hint="again")


def test_a_missing_tensor(bench: Bench) -> None:
    bench.save({name: tensor for name, tensor in bench.tensors().items() if name != QUERY})
    bench.export_fails().says(
        QUERY, "expected shape [128, 64]", "not in the checkpoint", hint="different models"
    )


@pytest.mark.parametrize("shape", [(128, 32), (64, 128), (128, 64, 1)])
def test_a_wrong_shape(bench: Bench, shape: tuple[int, ...]) -> None:
    bench.save(bench.tensors() | {QUERY: np.zeros(shape, np.float32)})
    bench.export_fails().says(
        QUERY, "expected shape [128, 64]", f"got {list(shape)}", hint="different models"
    )


def test_tensors_without_use_are_told(bench: Bench) -> None:
    biases = [f"model.layers.{layer}.self_attn.q_proj.bias" for layer in range(3)]
    extra = dict.fromkeys(biases, np.ones(128, np.float32)) | {
        "model.layers.0.self_attn.rotary_emb.inv_freq": np.ones(16, np.float32),
        "v_head": np.ones(1, np.float32),
    }
    bench.save(bench.tensors() | extra)
    result = bench.export()
    assert result.exit_code == 0
    (warning,) = [line for line in result.stderr.splitlines() if line.startswith("warning:")]
    assert warning == f"warning: tensors that the model does not use: {', '.join(biases)} and 1 more"


@pytest.mark.parametrize("target", ["ort", "aipc"])
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("name", [QUERY, NORM, "model.embed_tokens.weight"])
def test_a_value_that_is_not_finite(bench: Bench, name: str, value: float, target: str) -> None:
    tensors = bench.tensors()
    tensors[name].reshape(-1)[-1] = value
    bench.save(tensors)
    bench.export_fails(target=target).says(
        f"tensor {name}", "NaN or infinity", "expected finite", hint="damaged"
    )


def test_a_value_beyond_float16(bench: Bench) -> None:
    tensors = bench.tensors()
    tensors[QUERY][5, 7] = 1e6
    bench.save(tensors)
    refusal = bench.export_fails("--weight-format", "fp16")
    refusal.says(f"tensor {QUERY}", "1e+06", "65504", hint="bf16")


def test_no_tokenizer(bench: Bench) -> None:
    (bench.checkpoint / "tokenizer.json").unlink()
    bench.export_fails().says("no tokenizer", "neither tokenizer.json nor tokenizer.model", hint="download")


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("tokenizer.json", b"{"),
        ("tokenizer.json", b'{"version": "1.0", "model": {"type": "Sorcery"}}'),
        ("tokenizer.json", b""),
        ("tokenizer_config.json", b"[1, 2]"),
        ("tokenizer_config.json", b"{'bos_token': '<s>'}"),
        ("chat_template.jinja", b"\xff\xfe{"),
    ],
)
@pytest.mark.parametrize("target", ["ort", "aipc"])
def test_a_damaged_tokenizer(bench: Bench, name: str, content: bytes, target: str) -> None:
    (bench.checkpoint / name).write_bytes(content)
    bench.export_fails(target=target).says(name, hint="download the tokenizer files")


@pytest.mark.parametrize("name", ["config.json", "generation_config.json"])
@pytest.mark.parametrize("text", ["", "{", "[]", "\0", "[" * 100_000])
def test_a_damaged_config(bench: Bench, name: str, text: str) -> None:
    (bench.checkpoint / name).write_text(text)
    bench.export_fails().says(name, hint="download or copy the checkpoint again")


def test_no_weights(bench: Bench) -> None:
    (bench.checkpoint / "model.safetensors").unlink()
    bench.export_fails().says("holds no weights", "expected model.safetensors", hint="download")


@pytest.mark.parametrize("name", ["no/such/folder", "nosuchfile.gguf", "", "a b"])
def test_nothing_there(bench: Bench, name: str) -> None:
    result = bench.fails(lambda: bench.export(model=name or "./"))
    if name:
        result.says(name, "no such file or folder", hint="openbmb/MiniCPM4-0.5B")
    else:
        result.says("config.json is missing", hint="folder")


def test_an_unknown_id_offline(bench: Bench) -> None:
    command = [sys.executable, "-m", "cpm_edge.exporter.cli", "--model", "nobody/nothing", "--target", "ort"]
    offline = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_HOME": str(bench.root / "hub")}
    before = bench.files()
    done = subprocess.run(
        [*command, "-o", str(bench.output)], env=offline, capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stdout) == (1, "")
    parse(done.stderr).says("nobody/nothing", "HF_HUB_OFFLINE", hint="unset HF_HUB_OFFLINE")
    assert [name for name in bench.files() if not name.startswith("hub")] == before


def test_a_local_checkpoint_has_no_revision(bench: Bench) -> None:
    bench.export_fails("--revision", "main").says("--revision main", "local", hint="leave")


def test_an_output_that_exists(bench: Bench) -> None:
    assert bench.export().exit_code == 0
    marker = bench.output / "cpm_edge.json"
    first = json.loads(marker.read_text())
    bench.export_fails("--max-context", "32").says(str(bench.output), "exists already", hint="--overwrite")
    assert json.loads(marker.read_text()) == first
    assert bench.export("--overwrite", "--max-context", "32").exit_code == 0
    assert json.loads(marker.read_text())["context"]["max_context"] == 32


def test_an_existing_output_is_found_before_the_checkpoint_is_opened(bench: Bench) -> None:
    bench.output.mkdir(parents=True)
    bench.export_fails(model="no/such/folder").says("exists already", hint="--overwrite")


@pytest.mark.parametrize("kind", ["folder", "file", "checkpoint"])
def test_overwrite_spares_what_is_no_bundle(bench: Bench, kind: str) -> None:
    if kind == "checkpoint":
        bench.output = bench.checkpoint
    elif kind == "folder":
        bench.output.mkdir(parents=True)
        (bench.output / "thesis.tex").write_text("precious")
    else:
        bench.output.parent.mkdir()
        bench.output.write_text("precious")
    bench.export_fails("--overwrite").says("will not overwrite", "not a bundle", hint="remove it yourself")


def test_a_failed_overwrite_keeps_the_old_bundle(bench: Bench) -> None:
    assert bench.export().exit_code == 0
    bench.save({})
    bench.export_fails("--overwrite").says("model.embed_tokens.weight", hint="different models")
    assert bench.run(bench.output).exit_code == 0


def test_an_output_with_a_name_too_long(bench: Bench) -> None:
    bench.output = bench.output.parent / ("x" * 300)
    bench.export_fails().says("cannot write", "File name too long", hint="choose another -o")


def test_a_checkpoint_with_a_name_too_long(bench: Bench) -> None:
    bench.export_fails(model="x" * 300).says("File name too long", "x" * 300, hint="check the path")


def test_an_output_below_a_file(bench: Bench) -> None:
    (bench.root / "made").write_text("a file")
    refusal = bench.export_fails()
    refusal.says("cannot write", str(Path("made") / "bundle"), hint="choose another -o")
