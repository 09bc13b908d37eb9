"""A bundle like MiniCPM5's: BOS in the template, two end-of-sequence ids, thinking, tools as XML."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from cpm_edge.runtimes.bundle import hash_files, open_bundle, write_manifest
from cpm_edge.runtimes.model import Model
from tests.runtimes.fakes import FakeEngine, make_bundle, manifest
from tests.runtimes.templates import MINICPM5, minicpm5_tokenizer

QUESTION = {"role": "user", "content": "hi"}
TOOL = {"type": "function", "function": {"name": "weather", "parameters": {"type": "object"}}}
CALL = {"function": {"name": "weather", "arguments": {"city": "Paris <3", "days": 2}}}
CALL_TEXT = (
    '<tool_call><function name="weather"><param name="city"><![CDATA[Paris <3]]></param>'
    '<param name="days">2</param></function></tool_call>'
)

BACKEND = minicpm5_tokenizer()
BOS, END = (BACKEND.get_vocab()[token] for token in ("<s>", "<|im_end|>"))


def make(tmp_path: Path, answer: str) -> tuple[Model, FakeEngine]:
    folder = make_bundle(
        tmp_path / "bundle",
        {
            "config.json": {"bos_token_id": BOS, "eos_token_id": [1, END]},
            "generation_config.json": {"eos_token_id": [1, END]},
            "tokenizer_config.json": {"bos_token": "<s>", "eos_token": "</s>", "add_bos_token": False},
        },
    )
    BACKEND.save(str(folder / "tokenizer.json"))
    (folder / "chat_template.jinja").write_text(MINICPM5)
    write_manifest(folder, manifest(hash_files(folder)))
    engine = FakeEngine(BACKEND.get_vocab_size(), max_context=600, answer=BACKEND.encode(answer).ids)
    return Model.from_bundle(open_bundle(folder), engine, max_context=600), engine


@pytest.mark.parametrize(
    ("enabled", "tail"), [(True, "<think>\n"), (False, "<think>\n\n</think>\n\n"), (None, "")]
)
def test_the_switch_ends_the_prompt_and_bos_begins_it_once(
    tmp_path: Path, enabled: bool | None, tail: str
) -> None:
    model, engine = make(tmp_path, "he<|im_end|>")
    assert model.template is not None and model.template.has_thinking_switch
    model.chat([QUESTION], enable_thinking=enabled)
    tokens = engine.sessions[0].tokens
    assert tokens[0] == BOS and tokens.count(BOS) == 1
    fed = BACKEND.decode(tokens, skip_special_tokens=False)
    assert fed == f"<s><|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n{tail}he"


@pytest.mark.parametrize("end", ["</s>", "<|im_end|>"])
def test_either_end_ends_an_answer_after_its_thought(tmp_path: Path, end: str) -> None:
    model, _ = make(tmp_path, f"so\n</think>\n\nhe{end}and on")
    result = model.chat([QUESTION], enable_thinking=True)
    assert (result.finish_reason, result.thought, result.answer) == ("eos", "so", "he")
    assert result.text == "so\n</think>\n\nhe"


def test_a_thought_that_the_model_opens_itself(tmp_path: Path) -> None:
    model, _ = make(tmp_path, "<think>\nso\n</think>\n\nhe<|im_end|>")
    result = model.chat([QUESTION])
    assert (result.thought, result.answer) == ("so", "he")


def test_no_thought_when_thinking_is_off(tmp_path: Path) -> None:
    model, _ = make(tmp_path, "he<|im_end|>")
    result = model.chat([QUESTION], enable_thinking=False)
    assert (result.thought, result.answer, result.text) == ("", "he", "he")


def test_a_thought_cut_by_the_token_limit_is_no_answer(tmp_path: Path) -> None:
    model, _ = make(tmp_path, "so so so so</think>he<|im_end|>")
    result = model.chat([QUESTION], enable_thinking=True, max_new_tokens=4)
    assert (result.finish_reason, result.answer) == ("length", "")
    assert result.thought == result.text.strip() != ""


def test_events_tell_the_parts_apart_while_streaming(tmp_path: Path) -> None:
    model, _ = make(tmp_path, "so so\n</think>\n\nhe he<|im_end|>")
    stream = model.chat([QUESTION], enable_thinking=True, stream=True)
    events = list(stream.events())
    assert len(events) > 4, "the parts come in pieces"
    for kind, whole in (("thought", stream.result.thought), ("answer", stream.result.answer)):
        assert "".join(event.text for event in events if event.kind == kind) == whole
    assert (stream.result.thought, stream.result.answer) == ("so so", "he he")


def test_a_tool_call_comes_through_with_its_markup(tmp_path: Path) -> None:
    model, engine = make(tmp_path, f"so</think>\n\n{CALL_TEXT}<|im_end|>")
    result = model.chat([QUESTION], tools=[TOOL], enable_thinking=True)
    assert result.answer == CALL_TEXT
    fed = BACKEND.decode(engine.sessions[0].tokens, skip_special_tokens=False)
    assert '<tools>\n{"type": "function", "function": {"name": "weather"' in fed


def turn(content: str, **more: Any) -> dict[str, Any]:
    return {"role": "assistant", "content": content, **more}


def test_a_conversation_with_tools_keeps_only_the_thoughts_since_the_question(tmp_path: Path) -> None:
    model, _ = make(tmp_path, "he<|im_end|>")
    messages = [
        {"role": "system", "content": "be short"},
        QUESTION,
        turn("<think>\nold\n</think>\n\nyes"),
        turn("no", reasoning_content="older"),
        {"role": "user", "content": "weather?"},
        turn("", reasoning_content="new", tool_calls=[CALL]),
        {"role": "tool", "content": "sunny"},
    ]
    text = model.render(messages, tools=[TOOL], enable_thinking=True)
    assert text.startswith("<s><|im_start|>system\nbe short\n\n<tools>") and text.count("be short") == 1
    assert "<|im_start|>assistant\nyes<|im_end|>\n<|im_start|>assistant\nno<|im_end|>" in text
    assert f"<|im_start|>assistant\n<think>\nnew\n</think>\n\n{CALL_TEXT}<|im_end|>" in text
    assert text.endswith("\nsunny\n</tool_response><|im_end|>\n<|im_start|>assistant\n<think>\n")
