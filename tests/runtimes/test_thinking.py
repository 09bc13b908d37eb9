from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cpm_edge.runtimes.thinking import Event, ThoughtSplitter, opens_thought, split_thought

CASES = {
    "no thought": ("Hello.", False, "", "Hello."),
    "space before an answer is kept": ("\n Hello.", False, "", "\n Hello."),
    "a thought": ("<think>\nSo,\n so.\n</think>\n\nHello.\n", False, "So,\n so.", "Hello.\n"),
    "space before the tag": (" \n<think>So</think>Hello", False, "So", "Hello"),
    "an empty thought": ("<think>\n\n</think>\n\nHello", False, "", "Hello"),
    "opened by the prompt": ("So.\n</think>\n\nHello", True, "So.", "Hello"),
    "closed at once": ("</think>Hello", True, "", "Hello"),
    "never closed": ("<think>So and so </thi", False, "So and so </thi", ""),
    "never closed, opened by the prompt": ("So\n", True, "So", ""),
    "nothing": ("", False, "", ""),
    "nothing in a thought": (" \n", True, "", ""),
    "nothing after a thought": ("<think>So</think>\n\n", False, "So", ""),
    "the beginning of a tag": ("<thin", False, "", "<thin"),
    "tags in the answer are text": ("Use <think>x</think>.", False, "", "Use <think>x</think>."),
    "tags after the thought are text": ("a</think>b</think><think>c", True, "a", "b</think><think>c"),
    "space and what looks like a tag": ("<think>a <b \n </thinker</think>c", False, "a <b \n </thinker", "c"),
}


@pytest.mark.parametrize(("text", "in_thought", "thought", "answer"), CASES.values(), ids=CASES)
def test_thought_and_answer(text: str, in_thought: bool, thought: str, answer: str) -> None:
    assert split_thought(text, in_thought=in_thought) == (thought, answer)


PIECES = st.lists(
    st.sampled_from(["<", "think>", "<think>", "</think>", "</", "think", ">", "a", " ", "\n", ""])
)


@given(PIECES, st.booleans())
def test_where_the_text_is_cut_makes_no_difference(pieces: list[str], in_thought: bool) -> None:
    text = "".join(pieces)
    expected = split_thought(text, in_thought=in_thought)
    for cut in (pieces, list(text)):
        splitter = ThoughtSplitter(in_thought=in_thought)
        events = [event for piece in cut for event in splitter.push(piece)] + splitter.flush()
        assert all(event.text for event in events)
        kinds = [event.kind for event in events]
        assert kinds == sorted(kinds, key=["thought", "answer"].index)
        got = tuple("".join(e.text for e in events if e.kind == kind) for kind in ("thought", "answer"))
        assert got == expected


@given(PIECES, st.booleans())
def test_the_parts_are_the_text_without_one_pair_of_tags(pieces: list[str], in_thought: bool) -> None:
    text = "".join(pieces)
    thought, answer = split_thought(text, in_thought=in_thought)
    assert thought == thought.strip()
    if not in_thought and not text.lstrip().startswith("<think>"):
        assert (thought, answer) == ("", text)
    else:
        assert text.count("a") == (thought + answer).count("a")
        assert text.endswith(answer) and thought in text


def test_only_what_may_be_a_tag_is_held_back() -> None:
    splitter = ThoughtSplitter()
    assert splitter.push("<thi") == []
    assert splitter.push("nk>I see") == [Event("thought", "I see")]
    assert splitter.push(" < \n") == [Event("thought", " <")]
    assert splitter.push("</th") == []
    assert splitter.push("e end</think>\n") == [Event("thought", " \n</the end")]
    assert splitter.push("\nYes ") == [Event("answer", "Yes ")]
    assert splitter.push("<think>") == [Event("answer", "<think>")]
    assert splitter.flush() == []


@pytest.mark.parametrize(
    ("prompt", "expected"),
    [
        ("assistant\n<think>\n", True),
        ("<think>", True),
        ("<think>\n\n</think>\n\n", False),
        ("think>", False),
    ],
)
def test_prompts_that_open_a_thought(prompt: str, expected: bool) -> None:
    assert opens_thought(prompt) is expected
