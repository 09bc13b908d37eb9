from __future__ import annotations

from pathlib import Path

import pytest
from click.testing import CliRunner

from cpm_edge.runtimes.cli import main as cpm_run
from tests.bad_input.bench import Bench


@pytest.mark.parametrize("arguments", [("--prompt", ""), ("--prompt", " \n"), ("--prompt", "", "--raw")])
def test_an_empty_prompt(bench: Bench, bundle: Path, arguments: tuple[str, ...]) -> None:
    bench.run_fails(bundle, *arguments).says("the prompt is empty", hint="Give")


@pytest.mark.parametrize(
    ("arguments", "what"),
    [
        (("--prompt", "a\udcff"), "the prompt"),
        (("--prompt", "a\udcff", "--raw"), "the prompt"),
        (("--prompt", "a", "--system", "\udcff"), "the prompt"),
        (("--prompt", "a", "--stop", "\udcff"), "--stop"),
    ],
)
def test_bytes_that_are_no_text(bench: Bench, bundle: Path, arguments: tuple[str, ...], what: str) -> None:
    """Python reads arguments that are not UTF-8 as lone surrogates."""
    bench.run_fails(bundle, *arguments).says(what, "expected Unicode text, got '\\udcff'", hint="UTF-8")


def test_stdin_that_is_no_text(bench: Bench, bundle: Path) -> None:
    refusal = bench.fails(lambda: CliRunner().invoke(cpm_run, [str(bundle)], input=b"a\xff"))
    refusal.says("the prompt on stdin: expected UTF-8 text", hint="Save the text as UTF-8")


@pytest.mark.parametrize("extra", [[], ["--raw"]])
def test_a_prompt_longer_than_the_context(bench: Bench, bundle: Path, extra: list[str]) -> None:
    refusal = bench.run_fails(bundle, "--prompt", "x" * 200, *extra)
    refusal.says("the prompt has 2", "the context holds 64", hint="--max-context")


def test_a_context_longer_than_the_bundle(bench: Bench, bundle: Path) -> None:
    refusal = bench.run_fails(bundle, "--prompt", "hi", "--max-context", "65")
    refusal.says("max_context: expected 1 to 64", "got 65", hint="--max-context 65")


@pytest.mark.parametrize(
    ("template", "words", "hint"),
    [
        ("{% if %}", ["chat template has an error", "line 1"], "--raw"),
        ("{{ raise_exception('no roles, please') }}", ["chat template failed", "no roles, please"], "--raw"),
        ("{{ messages[7].content }}", ["chat template failed"], "--raw"),
        ("{% include 'other' %}", ["chat template failed"], "--raw"),
        ("{{ messages.clear() }}", ["chat template tried something unsafe"], "--raw"),
    ],
)
def test_a_broken_chat_template(bench: Bench, template: str, words: list[str], hint: str) -> None:
    (bench.checkpoint / "chat_template.jinja").write_text(template)
    assert bench.export().exit_code == 0
    bench.run_fails(bench.output).says(*words, hint=hint)
    # What the hint says works.
    assert bench.run(bench.output, "--raw", "--prompt", "hi", "--max-new-tokens", "1").exit_code == 0


def test_generation_defaults_out_of_range(bench: Bench) -> None:
    bench.edit("generation_config.json", do_sample=True, temperature=-3)
    assert bench.export().exit_code == 0
    refusal = bench.run_fails(bench.output)
    refusal.says("generation_config.json: temperature", "got -3", hint="export again")


@pytest.mark.parametrize("value", ["</s>", [1, None], 1.5])
def test_end_of_sequence_ids_that_are_none(bench: Bench, value: object) -> None:
    bench.edit("generation_config.json", eos_token_id=value)
    refusal = bench.export_fails(target="ort")
    refusal.says("generation_config.eos_token_id: expected token ids", repr(value), hint="correct it")
    assert bench.export(target="aipc").exit_code == 0
    refusal = bench.run_fails(bench.output)
    refusal.says("generation_config.json: eos_token_id: expected an integer", repr(value), hint="again")
