from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

from cpm_edge.exporter.checkpoint import open_checkpoint
from cpm_edge.exporter.errors import CheckpointError
from tests.exporter.checkpoint.builders import CONFIG, model_weights, write_gguf, write_json

WEIGHTS = {"w": np.ones((2, 3), dtype=np.float32)}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    folder = tmp_path / "tiny"
    folder.mkdir()
    write_json(folder / "config.json", CONFIG | {"auto_map": {"AutoModelForCausalLM": "modeling.X"}})
    save_file(WEIGHTS, folder / "model.safetensors")
    return folder


def test_a_folder_is_named_after_itself(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(folder)
    (folder / "modeling.py").write_text("raise SystemExit('code of the checkpoint was run')")
    for ref in (str(folder), f"{folder}/", "."):
        with open_checkpoint(ref) as checkpoint:
            assert checkpoint.name == "tiny"
            assert checkpoint.config["auto_map"]
            assert checkpoint.generation_config == {}


def test_generation_config_is_read_and_identifies(folder: Path) -> None:
    write_json(folder / "generation_config.json", {"eos_token_id": [2, 73440]})
    with open_checkpoint(str(folder)) as checkpoint:
        assert checkpoint.generation_config == {"eos_token_id": [2, 73440]}
        assert "generation_config.json" in checkpoint.fingerprint()["files"]


def test_home_is_expanded(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(folder.parent))
    monkeypatch.setenv("USERPROFILE", str(folder.parent))
    open_checkpoint("~/tiny").close()


def test_an_existing_path_wins_over_a_hub_id(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(folder.parent.parent)
    with open_checkpoint(f"{folder.parent.name}/tiny") as checkpoint:
        assert checkpoint.name == "tiny"


@pytest.mark.parametrize(
    "ref", ["nowhere", "./a/b", "/no/such/folder", "a/b/c", "model.gguf", "org/model.gguf", "", "org/na me"]
)
def test_what_is_neither_path_nor_id_is_said(
    ref: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(CheckpointError, match="no such file or folder, and not a Hugging Face id") as caught:
        open_checkpoint(ref)
    assert "openbmb/MiniCPM4-0.5B" in str(caught.value.hint)


def test_a_lone_gguf_file_stands_for_its_folder(tmp_path: Path) -> None:
    write_gguf(tmp_path / "a.gguf", model_weights())
    with open_checkpoint(str(tmp_path)) as checkpoint:
        assert (checkpoint.kind, checkpoint.name) == ("gguf", tmp_path.name)
    write_gguf(tmp_path / "b.gguf", model_weights())
    with pytest.raises(CheckpointError, match=r"several GGUF files: a\.gguf, b\.gguf"):
        open_checkpoint(str(tmp_path))


def test_a_lone_safetensors_file_of_another_name_is_taken(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "gptq_model-4bit-128g.safetensors")
    with open_checkpoint(str(folder)) as checkpoint:
        np.testing.assert_array_equal(checkpoint.read("w"), WEIGHTS["w"])
    save_file(WEIGHTS, folder / "second.safetensors")
    with pytest.raises(CheckpointError, match=r"2 safetensors files and no model\.safetensors\.index\.json"):
        open_checkpoint(str(folder))


@pytest.mark.parametrize(
    ("rename", "message"),
    [
        (("config.json", "x.json"), "config.json is missing"),
        (("model.safetensors", "weights.npz"), "holds no weights"),
        (("model.safetensors", "adapter_model.safetensors"), "a LoRA adapter"),
    ],
    ids=["config", "weights", "adapter"],
)
def test_missing_files_are_named(folder: Path, rename: tuple[str, str], message: str) -> None:
    (folder / rename[0]).rename(folder / rename[1])
    with pytest.raises(CheckpointError, match=message):
        open_checkpoint(str(folder))


@pytest.mark.parametrize("content", ["", "{", "[]", "null"])
def test_a_config_that_is_no_json_object_is_refused(folder: Path, content: str) -> None:
    (folder / "config.json").write_text(content)
    with pytest.raises(CheckpointError, match=r"config\.json"):
        open_checkpoint(str(folder))


def test_other_files_are_refused(folder: Path) -> None:
    with pytest.raises(CheckpointError, match=r"expected a checkpoint folder or a \.gguf file"):
        open_checkpoint(str(folder / "model.safetensors"))


def test_a_revision_of_a_local_folder_is_refused(folder: Path) -> None:
    with pytest.raises(CheckpointError, match="only a Hugging Face id has revisions"):
        open_checkpoint(str(folder), revision="main")
