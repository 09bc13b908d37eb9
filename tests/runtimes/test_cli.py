from __future__ import annotations

import contextlib
import io
import json
import re
from pathlib import Path
from typing import Any

import click
import pytest
from click.testing import CliRunner, Result

import cpm_edge.runtimes as runtimes
from cpm_edge.runtimes.bundle import ContextLimits
from cpm_edge.runtimes.cli import main
from cpm_edge.runtimes.console import report_errors
from cpm_edge.runtimes.errors import CpmEdgeError
from cpm_edge.runtimes.generate import Stream
from cpm_edge.runtimes.printer import show
from tests.runtimes.fakes import CHATML, FakeEngine, byte_level_tokenizer, make_bundle

BACKEND = byte_level_tokenizer()


class Setup:
    """A bundle on disk, a fake engine behind it, and a way to call cpm-run."""

    def __init__(self, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.folder = folder
        self.answer = "he wo</s>"
        self.engines: list[FakeEngine] = []
        self.max_context = 64
        make_bundle(folder)
        monkeypatch.setattr(runtimes, "open_engine", self._open)

    def _open(self, bundle: Any, device: str, threads: int | None, max_context: int | None) -> FakeEngine:
        ids = list(BACKEND.encode(self.answer).ids)
        self.engines.append(FakeEngine(BACKEND.get_vocab_size(), max_context=self.max_context, answer=ids))
        return self.engines[-1]

    def run(self, *arguments: str, stdin: str | None = None) -> Result:
        return CliRunner().invoke(main, [str(self.folder), *arguments], input=stdin)

    def prompts(self) -> list[str]:
        """What the sessions were fed, their answers included."""
        return [BACKEND.decode(s.tokens, skip_special_tokens=False) for s in self.engines[-1].sessions]


@pytest.fixture
def setup(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Setup:
    return Setup(tmp_path / "bundle", monkeypatch)


def test_a_prompt_becomes_one_user_turn(setup: Setup) -> None:
    result = setup.run("--prompt", "hi", "--system", "be short")
    assert (result.exit_code, result.stdout, result.stderr) == (0, "he wo\n", "")
    start = "<|im_start|>system\nbe short<|im_end|>\n<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n"
    assert setup.prompts() == [start + "he wo"]
    assert setup.engines[0].closed


def test_raw_and_stdin(setup: Setup) -> None:
    assert setup.run("--raw", stdin="hi\n\n").stdout == "he wo\n"
    assert setup.prompts() == ["hi\nhe wo"]
    assert setup.run("--raw", "--prompt", "-", stdin="ho").stdout == "he wo\n"
    assert setup.prompts() == ["hohe wo"]


def test_a_bundle_without_template_takes_prompts_as_they_are(tmp_path: Path, setup: Setup) -> None:
    make_bundle(setup.folder, {"tokenizer_config.json": {}})
    assert setup.run("--prompt", "hi").stdout == "he wo\n"
    assert setup.prompts() == ["hihe wo"]
    assert "this bundle has no chat template" in setup.run("--chat", stdin="").stderr


def test_json(setup: Setup) -> None:
    result = setup.run("--prompt", "hi", "--json", "--stats", "-n", "2")
    report = json.loads(result.stdout)
    assert (report["text"], report["finish_reason"], len(report["token_ids"])) == ("he wo", "length", 2)
    assert report["stats"]["new_tokens"] == 2
    assert {"load_seconds", "ttft_seconds", "tpot_seconds", "peak_rss_bytes"} <= set(report["stats"])
    assert result.stderr == ""


def test_stats_go_to_stderr(setup: Setup) -> None:
    result = setup.run("--prompt", "hi", "--stats")
    assert result.stdout == "he wo\n"
    for word in ("load time", "TTFT", "TPOT", "prefill", "decode", "tok/s", "peak memory", "eos"):
        assert word in result.stderr


def test_options_reach_the_generation(setup: Setup, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[Any] = []
    real = Stream.__init__

    def spy(self: Stream, *arguments: Any, **keywords: Any) -> None:
        seen.append(arguments[3])
        real(self, *arguments, **keywords)

    monkeypatch.setattr(Stream, "__init__", spy)
    make_bundle(setup.folder, {"generation_config.json": {"do_sample": True, "temperature": 0.8, "top_k": 9}})
    setup.run("-p", "x", "--temperature", "0", "--seed", "0", "--top-k", "0", "--stop", "a", "--stop", "b")
    assert (seen[0].temperature, seen[0].seed, seen[0].top_k, seen[0].stop) == (0, 0, 0, ("a", "b"))
    setup.run("-p", "x")
    assert (seen[1].temperature, seen[1].top_k, seen[1].stop, seen[1].ignore_eos) == (0.8, 9, (), False)


@pytest.mark.parametrize(("flag", "expected"), [("--think", "yes"), ("--no-think", "no"), (None, "unset")])
def test_thinking(setup: Setup, flag: str | None, expected: str) -> None:
    switch = "{{ 'yes' if enable_thinking else 'no' }}"
    template = "{% if enable_thinking is defined %}" + switch + "{% else %}unset{% endif %}"
    make_bundle(setup.folder, {"tokenizer_config.json": {"chat_template": template}})
    setup.run("-p", "x", *([flag] if flag else []))
    assert setup.prompts() == [expected + "he wo"]


def test_a_thinking_flag_without_effect_is_noted(setup: Setup) -> None:
    assert "note: this model's chat template has no thinking switch" in setup.run("-p", "x", "--think").stderr


THOUGHT = "<think>\nwo\n</think>\n\nhe</s>"


def test_a_pipe_gets_thought_and_answer_as_they_are(setup: Setup) -> None:
    setup.answer = THOUGHT
    assert setup.run("-p", "x").stdout == "<think>\nwo\n</think>\n\nhe\n"
    make_bundle(setup.folder, {"tokenizer_config.json": {"chat_template": CHATML + "<think>\n"}})
    setup.answer = "wo\n</think>\n\nhe</s>"
    assert setup.run("-p", "x").stdout == "<think>\nwo\n</think>\n\nhe\n", "the tag of the template"


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_a_terminal_gets_the_thought_dimmed(setup: Setup) -> None:
    setup.answer = THOUGHT
    with runtimes.load(setup.folder) as model, contextlib.redirect_stdout(Terminal()) as screen:
        show(model.chat([{"role": "user", "content": "x"}], stream=True))
    dimmed = re.findall(r"\x1b\[2m(.*?)\x1b\[0m", screen.getvalue(), re.DOTALL)
    plain = re.sub(r"\x1b\[2m.*?\x1b\[0m", "", screen.getvalue(), flags=re.DOTALL)
    assert ("".join(dimmed), plain) == ("wo", "\n\nhe\n")


def test_a_hidden_thought(setup: Setup) -> None:
    setup.answer = THOUGHT
    result = setup.run("-p", "x", "--hide-thought")
    assert (result.stdout, result.stderr) == ("he\n", "")
    result = setup.run("-p", "x", "--hide-thought", "-n", "2")
    assert (result.stdout, result.stderr) == ("\n", "[the answer ended within its thought]\n")


def test_json_has_the_parts(setup: Setup) -> None:
    setup.answer = THOUGHT
    report = json.loads(setup.run("-p", "x", "--json", "--hide-thought").stdout)
    assert (report["thought"], report["answer"]) == ("wo", "he")
    assert report["text"] == THOUGHT.removesuffix("</s>")


SWITCH = CHATML.replace(
    "assistant\n{% endif %}",
    "assistant\n{{ 'U' if enable_thinking is undefined else 'Y' if enable_thinking else 'N' }}{% endif %}",
)


def test_the_chat_switches_thinking(setup: Setup) -> None:
    setup.max_context = 400
    config = {"tokenizer_config.json": {"chat_template": SWITCH}}
    make_bundle(setup.folder, config, context=ContextLimits(max_context=400))
    asked: list[str] = []
    for lines, flags in (
        (["a", "/think", "b", "/no_think", "c", "d /think"], []),
        (["a", "/no_think", "b"], ["--think"]),
    ):
        result = setup.run("--chat", *flags, stdin="\n".join(lines))
        assert "Thinking is off from here on." in result.stderr
        asked += setup.prompts()
    assert [re.findall("assistant\n([UYN])", prompt)[-1] for prompt in asked] == ["N", "N"]
    assert "d /think<|im_end|>" in asked[0] and "/no_think" not in "".join(asked)


def test_a_chat_remembers_answers_without_their_thoughts(setup: Setup) -> None:
    setup.max_context = 400
    setup.answer = THOUGHT
    make_bundle(setup.folder, context=ContextLimits(max_context=400))
    result = setup.run("--chat", "--hide-thought", stdin="hi\nho\n")
    assert result.stdout.count("he\n") == 2 and "wo" not in result.stdout
    (fed,) = setup.prompts()
    assert "<|im_start|>assistant\nhe<|im_end|>\n<|im_start|>user\nho" in fed


def test_a_chat_without_a_switch_says_so(setup: Setup) -> None:
    result = setup.run("--chat", stdin="/think\n")
    assert "note: this model's chat template has no thinking switch" in result.stderr
    assert setup.prompts() == []


@pytest.mark.parametrize(
    "arguments",
    [["--chat", "-p", "x"], ["--chat", "--json"], ["--chat", "--raw"], ["--raw", "--system", "x", "-p", "x"],
     ["-p", "x", "--top-p", "0"], ["-p", "x", "--threads", "0"], ["-p", "x", "--flavour", "vanilla"],
     ["-p", "x", "--no-such-option"]],
)  # fmt: skip
def test_usage_errors_exit_with_2(setup: Setup, arguments: list[str]) -> None:
    result = setup.run(*arguments)
    assert result.exit_code == 2
    assert "Usage:" in result.stderr
    assert setup.engines == []


@pytest.mark.parametrize(
    ("arguments", "error", "hint"),
    [
        (["-p", ""], "error: the prompt is empty", "hint: Give one with --prompt"),
        (["-p", "", "--raw"], "error: the prompt is empty", "hint: Give at least"),
        (["-p", "h" * 99], "error: the prompt has 1", "hint: Shorten it"),
        (["-p", "x", "--max-context", "65"], "error: max_context: expected 1 to 64", "hint: Leave it out"),
    ],
)
def test_errors_have_a_hint_and_exit_with_1(
    setup: Setup, arguments: list[str], error: str, hint: str
) -> None:
    result = setup.run(*arguments)
    assert (result.exit_code, result.stdout) == (1, "")
    lines = result.stderr.splitlines()
    assert lines[0].startswith(error)
    assert lines[1].startswith(hint)
    assert len(lines) == 2


def test_a_damaged_bundle(setup: Setup) -> None:
    (setup.folder / "model.onnx").write_bytes(b"NOT really a model")
    result = setup.run("-p", "x")
    assert result.exit_code == 1
    assert result.stderr.startswith("error: model.onnx is damaged")
    missing = CliRunner().invoke(main, ["no/such/bundle", "-p", "x"])
    assert (missing.exit_code, missing.stderr.splitlines()[0]) == (
        1,
        f"error: there is no bundle folder {Path('no/such/bundle')}",
    )


def test_a_template_that_runs_code_does_not(setup: Setup) -> None:
    template = "{{ cycler.__init__.__globals__.os.system('touch PWNED') }}"
    make_bundle(setup.folder, {"tokenizer_config.json": {"chat_template": template}})
    result = setup.run("-p", "x")
    assert result.exit_code == 1
    assert result.stderr.startswith("error: the chat template tried something unsafe")
    assert not Path("PWNED").exists()


def test_defects_keep_their_traceback(setup: Setup, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: Any) -> None:
        raise ZeroDivisionError

    monkeypatch.setattr(runtimes, "open_engine", broken)
    assert isinstance(setup.run("-p", "x").exception, ZeroDivisionError)


def test_ctrl_c_stops_the_answer(setup: Setup, monkeypatch: pytest.MonkeyPatch) -> None:
    real = FakeEngine.session

    def session(self: FakeEngine) -> Any:
        made = real(self)
        made.fail_at = (len(BACKEND.encode(CHAT_START).ids) + 1, KeyboardInterrupt())
        return made

    monkeypatch.setattr(FakeEngine, "session", session)
    result = setup.run("-p", "hi")
    assert (result.exit_code, result.stdout) == (1, "he wo\n")


CHAT_START = "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n"


def test_chat_keeps_the_conversation_and_obeys_commands(setup: Setup) -> None:
    setup.max_context = 400
    make_bundle(setup.folder, context=ContextLimits(max_context=400))
    lines = ["/stats", "/help", "hi", "", "ho", "/stats", "/no_think x", "/reset", "hi", "/exit", "never"]
    result = setup.run("--chat", stdin="\n".join(lines))
    assert result.exit_code == 0
    assert result.stdout.count("he wo\n") == 4
    assert re.search("/reset +forget the conversation", result.stdout)
    assert "There is no answer yet." in result.stderr
    assert "TTFT" in result.stderr
    assert setup.prompts() == [CHAT_START + "he wo"]
    assert len(setup.engines[0].sessions) == 1


def test_a_turn_too_long_is_dropped_and_the_chat_goes_on(setup: Setup) -> None:
    result = setup.run("--chat", stdin="h" * 99 + "\nhi\n")
    assert result.exit_code == 0
    assert "error: the prompt has" in result.stderr
    assert result.stdout.startswith("he wo\n")
    assert setup.prompts() == [CHAT_START + "he wo"]


def test_help_shows_examples() -> None:
    result = CliRunner().invoke(main, ["--help"])
    assert result.exit_code == 0
    assert 'cpm-run bundle/ --prompt "Why is the sky blue?"' in result.stdout


def test_report_errors_serves_other_commands() -> None:
    @click.command()
    @report_errors
    def command() -> None:
        raise CpmEdgeError("no hint here")

    result = CliRunner().invoke(command)
    assert (result.exit_code, result.stderr) == (1, "error: no hint here\n")
