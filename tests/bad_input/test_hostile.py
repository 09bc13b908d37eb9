"""Files that try to run code when a checkpoint is exported or a bundle is run: none of it runs."""

from __future__ import annotations

import os
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.bad_input.bench import Bench, refused

ATTACKS = (
    "{{{{ cycler.__init__.__globals__.os.system('touch {marker}') }}}}",
    "{{{{ ''.__class__.__mro__[1].__subclasses__() }}}}",
    "{{{{ messages.__class__.__base__.__subclasses__() }}}}",
    "{{{{ self._TemplateReference__context }}}}",
    "{{{{ namespace.__init__.__globals__['__builtins__']['open']('{marker}', 'w') }}}}",
    "{{{{ '{{0.__class__}}'.format(messages) }}}}",
)


@pytest.fixture
def marker(bench: Bench) -> Path:
    """A file that every attack of this module tries to make."""
    return bench.root / "PWNED"


@pytest.mark.parametrize("target", ["ort", "aipc"])
def test_auto_map_and_code_files_are_not_run(bench: Bench, marker: Path, target: str) -> None:
    code = f"open({str(marker)!r}, 'w').close()\n"
    names = ("configuration_evil", "modeling_evil", "tokenization_evil", "__init__", "conftest", "torch")
    for name in names:
        (bench.checkpoint / f"{name}.py").write_text(code)
    bench.edit(
        "config.json",
        auto_map={
            "AutoConfig": "configuration_evil.EvilConfig",
            "AutoModelForCausalLM": "modeling_evil.EvilModel",
            "AutoTokenizer": ["tokenization_evil.EvilTokenizer", "tokenization_evil.EvilTokenizer"],
        },
    )
    bench.edit(
        "tokenizer_config.json",
        auto_map={"AutoTokenizer": ["tokenization_evil.EvilTokenizer", None]},
        tokenizer_class="EvilTokenizer",
    )
    result = bench.export(target=target)
    assert result.exit_code == 0, result.stderr
    assert bench.run(bench.output).exit_code == 0
    assert not marker.exists()
    assert not list(bench.output.rglob("*.py"))


def test_modules_in_the_current_folder_are_not_imported(
    bench: Bench, marker: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The verification runs in a process of its own, whose current folder may be the checkpoint."""
    for name in ("numpy", "json", "onnxruntime", "tokenizers", "sitecustomize"):
        (bench.checkpoint / f"{name}.py").write_text(f"open({str(marker)!r}, 'w').close()\n")
    monkeypatch.chdir(bench.checkpoint)
    result = bench.export("--verify", model=".")
    assert result.exit_code == 0, result.stderr
    assert "verified" in result.stderr
    assert not marker.exists()


@pytest.mark.parametrize("attack", ATTACKS)
def test_a_template_that_runs_code(bench: Bench, marker: Path, attack: str) -> None:
    (bench.checkpoint / "chat_template.jinja").write_text(attack.format(marker=marker))
    check_template_is_stopped(bench, marker, "ort")


@pytest.mark.parametrize("place", ["chat_template.jinja", "tokenizer_config.json"])
def test_converting_a_template_runs_none_of_it(bench: Bench, marker: Path, place: str) -> None:
    """The tokenizer that OpenVINO gets carries the template too."""
    template = "".join(attack.format(marker=marker) for attack in ATTACKS)
    if place == "chat_template.jinja":
        (bench.checkpoint / place).write_text(template)
    else:
        bench.edit(place, chat_template=template)
    check_template_is_stopped(bench, marker, "aipc")


def check_template_is_stopped(bench: Bench, marker: Path, target: str) -> None:
    result = bench.export(target=target)
    assert result.exit_code == 0, result.stderr
    assert not marker.exists()
    refused(bench.run(bench.output)).says("the chat template tried something unsafe", hint="--raw")
    assert not marker.exists()


class _Touch:
    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, (f"touch {self.marker}",)


@pytest.mark.parametrize("form", ["zip", "pickle"])
def test_a_pickle_that_runs_code(bench: Bench, marker: Path, form: str) -> None:
    file = bench.checkpoint / "pytorch_model.bin"
    (bench.checkpoint / "model.safetensors").unlink()
    state = {"model.norm.weight": torch.ones(2), "lm_head.weight": _Touch(marker)}
    if form == "zip":
        torch.save(state, file)
    else:
        file.write_bytes(pickle.dumps(state))
    refusal = bench.export_fails()
    refusal.says("pytorch_model.bin", "could run code" if form == "zip" else "not a whole file", hint="")
    assert not marker.exists()
