from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cpm_edge.runtimes.chat import ChatTemplate
from cpm_edge.runtimes.errors import BackendError, ContextError, PromptError
from cpm_edge.runtimes.model import Model
from cpm_edge.runtimes.options import GenerationOptions
from cpm_edge.runtimes.tokenizer import Tokenizer
from tests.runtimes.fakes import CHATML, FakeEngine, byte_level_tokenizer

BACKEND = byte_level_tokenizer()
VOCAB = BACKEND.get_vocab_size()
END = BACKEND.get_vocab()["<|im_end|>"]
EOS = BACKEND.get_vocab()["</s>"]


def ids(text: str) -> list[int]:
    return list(BACKEND.encode(text).ids)


def make(
    answer: str | list[int] | None = None, max_context: int = 64, **config: Any
) -> tuple[Model, FakeEngine]:
    wanted = ids(answer) if isinstance(answer, str) else answer
    engine = FakeEngine(VOCAB, max_context=max_context, answer=wanted)
    tokenizer = Tokenizer(BACKEND, {"bos_token": "<s>", **config}, [EOS, END])
    template = ChatTemplate({"default": CHATML}, {})
    return Model(engine, tokenizer, template=template, max_context=max_context), engine


@pytest.mark.parametrize("end", ["</s>", "<|im_end|>"])
def test_any_end_of_sequence_ends_the_answer(end: str) -> None:
    model, engine = make(f"he wo{end}and on")
    result = model.generate("hi")
    assert (result.text, result.finish_reason) == ("he wo", "eos")
    assert result.token_ids == ids(f"he wo{end}")
    assert engine.sessions[0].released


def test_special_tokens_on_request() -> None:
    model, _ = make("<think>he<|im_end|>")
    assert model.generate("hi").text == "<think>he"
    assert model.generate("hi", special=True).text == "<think>he<|im_end|>"


def test_ignore_eos_and_length() -> None:
    model, _ = make("he</s>he")
    result = model.generate("hi", ignore_eos=True, max_new_tokens=3)
    assert (result.text, result.finish_reason) == ("hehe", "length")
    assert result.stats.new_tokens == 3


def test_greedy_is_the_engines_argmax_and_pieces_add_up() -> None:
    model, engine = make()
    stream = model.stream("hi", max_new_tokens=30, ignore_eos=True)
    text = "".join(stream)
    assert text == stream.result.text == model.decode(stream.result.token_ids)
    session = engine.session()
    token = int(session.forward(ids("hi")).argmax())
    for expected in stream.result.token_ids:
        assert token == expected
        token = int(session.forward([token]).argmax())


@given(answer=st.text(max_size=12), stop=st.text("abc 你", min_size=1, max_size=3))
@settings(max_examples=60, deadline=None)
def test_text_ends_before_the_stop_string(answer: str, stop: str) -> None:
    text = answer + stop
    model, _ = make(f"{text} tail</s>", max_context=500)
    # What was written as a special token would be one; the text that comes back is what counts.
    whole = model.generate("hi").text
    result = model.generate("hi", stop=[stop])
    assert (result.text, result.finish_reason) == (whole[: whole.index(stop)], "stop")


def test_a_stop_string_may_name_a_special_token() -> None:
    model, _ = make("he<|im_start|>user")
    result = model.generate("hi", stop="<|im_start|>")
    assert (result.text, result.finish_reason) == ("he", "stop")


def test_a_stop_string_that_never_completes_is_shown() -> None:
    model, _ = make("he he</s>")
    result = model.generate("hi", stop=["he!"])
    assert (result.text, result.finish_reason) == ("he he", "eos")


def test_an_answer_cut_inside_a_character_still_decodes() -> None:
    model, _ = make(ids("a😀")[:3])
    result = model.generate("hi", max_new_tokens=3)
    assert result.text == model.decode(result.token_ids) == "a\ufffd"


def test_the_context_ends_generation() -> None:
    model, engine = make(max_context=10)
    result = model.generate("h" * 7, ignore_eos=True)
    assert result.finish_reason == "context"
    assert engine.sessions[0].position == 10
    assert result.stats.new_tokens == 4  # the token after the last position is known, not stored
    assert model.generate("h" * 10, ignore_eos=True).stats.new_tokens == 1


def test_prompts_that_cannot_run_fail_at_the_call_before_any_work() -> None:
    model, engine = make(max_context=10)
    for call in (model.stream, model.generate):
        with pytest.raises(ContextError, match="the prompt has 11 tokens; the context holds 10"):
            call("h" * 11)
        with pytest.raises(PromptError, match="empty"):
            call("")
    with pytest.raises(ContextError, match="the context holds 10"):
        model.chat([{"role": "user", "content": "h" * 11}])
    with pytest.raises(PromptError, match="messages"):
        model.chat([])
    assert engine.sessions == []


def test_unknown_and_bad_options_fail_at_the_call() -> None:
    model, engine = make()
    with pytest.raises(TypeError, match="unknown option 'max_tokens'"):
        model.stream("hi", max_tokens=3)
    with pytest.raises(ValueError, match="top_p"):
        model.stream("hi", top_p=2)
    assert engine.sessions == []


def test_bos_is_never_doubled() -> None:
    model, engine = make("he</s>", add_bos_token=True)
    model.generate("hi")
    model.generate("<s>hi")
    assert engine.sessions[0].tokens == engine.sessions[1].tokens == ids("<s>hi") + ids("he")
    model.template = ChatTemplate({"default": "<s>" + CHATML}, {})
    assert model.encode(model.render([{"role": "user", "content": "hi"}])).count(ids("<s>")[0]) == 1


@pytest.mark.parametrize("where", [1, 4])
def test_ctrl_c_ends_the_stream_cleanly(where: int) -> None:
    model, engine = make("he he he he he")
    stream = model.stream("hi")
    engine.sessions[0].fail_at = (where, KeyboardInterrupt())
    text = "".join(stream)
    assert stream.result.finish_reason == "interrupted"
    assert stream.result.text == text == ("" if where == 1 else model.decode(stream.result.token_ids))
    assert engine.sessions[0].released


def test_an_engine_error_passes_through_and_releases_the_session() -> None:
    model, engine = make("he he")
    stream = model.stream("hi")
    engine.sessions[0].fail_at = (3, BackendError("device lost"))
    with pytest.raises(BackendError, match="device lost"):
        list(stream)
    assert engine.sessions[0].released


@pytest.mark.parametrize("pieces", [0, 1])
def test_a_closed_stream_has_a_result(pieces: int) -> None:
    model, engine = make("he he he")
    stream = model.stream("hi")
    with pytest.raises(RuntimeError, match="has not ended"):
        _ = stream.result
    for _ in range(pieces):
        next(stream)
    stream.close()
    stream.close()
    assert stream.result.finish_reason == "interrupted"
    assert engine.sessions[0].released
    assert list(stream) == []


def turn(role: str, content: str) -> dict[str, str]:
    return {"role": role, "content": content}


def test_chat_computes_only_what_is_new() -> None:
    model, engine = make("he<|im_end|>", max_context=500)
    messages = [turn("user", "hello")]
    first = model.chat(messages)
    assert (first.text, first.stats.cached_tokens) == ("he", 0)
    messages += [turn("assistant", first.text), turn("user", "and?")]
    second = model.chat(messages)
    assert len(engine.sessions) == 1
    prompt = model.encode(model.render(messages))
    # Everything up to the end of the first answer's text was there.
    assert second.stats.cached_tokens == len(ids(CHATML_FIRST))
    assert second.stats.prompt_tokens == len(prompt)
    assert engine.sessions[0].tokens[: len(prompt)] == prompt
    fresh, _ = make("he<|im_end|>", max_context=500)
    assert fresh.chat(messages).token_ids == second.token_ids


CHATML_FIRST = "<|im_start|>user\nhello<|im_end|>\n<|im_start|>assistant\nhe"


def test_the_same_conversation_again_runs_its_last_token() -> None:
    model, engine = make("he<|im_end|>", max_context=500)
    one = model.chat([turn("user", "hello")])
    engine.sessions[0].steps.clear()
    two = model.chat([turn("user", "hello")])
    assert one.text == two.text
    assert two.stats.cached_tokens == two.stats.prompt_tokens - 1
    assert engine.sessions[0].steps[0] == 1


def test_two_chats_at_once_do_not_share_a_cache() -> None:
    model, engine = make("he he he<|im_end|>", max_context=500)
    a = model.chat([turn("user", "hello")], stream=True)
    next(a)
    b = model.chat([turn("user", "other")], stream=True)
    next(b)
    assert len(engine.sessions) == 2
    list(b)
    list(a)
    assert a.result.text == b.result.text == "he he he"
    assert sorted(session.released for session in engine.sessions) == [False, True]
    model.close()
    assert all(session.released for session in engine.sessions)
    assert engine.closed


def test_chat_goes_on_after_an_interrupted_answer() -> None:
    model, engine = make("he he<|im_end|>", max_context=500)
    stream = model.chat([turn("user", "hello")], stream=True)
    engine.sessions[0].fail_at = (6, KeyboardInterrupt())
    assert list(stream) == []
    assert stream.result.finish_reason == "interrupted"
    again = model.chat([turn("user", "hello")])
    assert (again.text, again.stats.cached_tokens) == ("he he", 4)
    assert len(engine.sessions) == 1


def test_no_template() -> None:
    model, _ = make()
    model.template = None
    with pytest.raises(PromptError, match="no chat template"):
        model.chat([turn("user", "hi")])


def test_sampling_repeats_with_a_seed_and_defaults_are_changed_by_options() -> None:
    model, _ = make()
    model.defaults = GenerationOptions(temperature=1.0, max_new_tokens=8)
    one, two = (model.generate("hi", seed=5).token_ids for _ in range(2))
    assert one == two
    assert model.generate("hi", seed=6).token_ids != one
    greedy = [model.generate("hi", temperature=0).token_ids for _ in range(2)]
    assert greedy[0] == greedy[1] != one


def test_counts_stats_and_a_closed_model() -> None:
    model, _ = make("he he</s>")
    assert model.count_tokens("hello") == len(ids("hello"))
    assert model.count_tokens([turn("user", "hello")]) == len(ids(CHATML_FIRST)) - 1
    stats = model.generate("hello").stats
    assert (stats.prompt_tokens, stats.new_tokens) == (len(ids("hello")), len(ids("he he</s>")))
    assert stats.ttft_seconds >= stats.prefill_seconds > 0
    assert stats.tpot_seconds == stats.decode_seconds / (stats.new_tokens - 1)
    assert stats.peak_rss_bytes is not None
    assert stats.peak_rss_bytes > 10 << 20
    with model:
        pass
    with pytest.raises(BackendError, match="this model is closed"):
        model.session()
