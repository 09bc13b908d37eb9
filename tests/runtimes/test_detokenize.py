from __future__ import annotations

import itertools

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer

from cpm_edge.runtimes.detokenize import StopMatcher, StreamDecoder
from tests.runtimes.fakes import byte_level_tokenizer, sentencepiece_tokenizer

BYTE_LEVEL = byte_level_tokenizer()
SENTENCEPIECE = sentencepiece_tokenizer()
TOKENIZERS = {"byte-level": BYTE_LEVEL, "sentencepiece": SENTENCEPIECE}


def pieces(tokenizer: Tokenizer, ids: list[int], special: bool) -> list[str]:
    decoder = StreamDecoder(tokenizer, special=special)
    return [*(decoder.push(id_) for id_ in ids), decoder.flush()]


def ids_of(tokenizer: Tokenizer) -> st.SearchStrategy[list[int]]:
    """Any ids, some beyond the vocabulary, and stretches of ids that belong to real text."""
    anything = st.lists(st.integers(0, tokenizer.get_vocab_size() + 3), max_size=90)
    text = st.text(max_size=30).map(lambda t: tokenizer.encode(t, add_special_tokens=False).ids)
    return st.lists(st.one_of(anything, text), max_size=5).map(lambda parts: [*itertools.chain(*parts)])


@pytest.mark.parametrize("special", [False, True])
@given(ids=ids_of(BYTE_LEVEL))
@settings(max_examples=300, deadline=None)
def test_byte_level_pieces_add_up(ids: list[int], special: bool) -> None:
    whole = BYTE_LEVEL.decode(ids, skip_special_tokens=not special)
    assert "".join(pieces(BYTE_LEVEL, ids, special)) == whole


def SP(piece: str) -> int:  # noqa: N802 - reads as a literal in the lists below
    """The id of a SentencePiece piece."""
    return SENTENCEPIECE.get_vocab()[piece]


@pytest.mark.parametrize("special", [False, True])
@given(ids=ids_of(SENTENCEPIECE))
@example(ids=[*[SP("a")] * 28, *[SP("")] * 9, SP("▁b")])
@example(ids=[SP("<s>"), SP("▁a"), *[SP("<s>")] * 60, SP("▁b"), *[SP("▁")] * 60, SP("▁a")])
@example(
    ids=[*[SP("a")] * 40, *(SP(f"<0x{b:02X}>") for b in "😀".encode()), SP("<s>"), SP("<0x80>"), SP("a")]
)
@settings(max_examples=300, deadline=None)
def test_sentencepiece_pieces_add_up(ids: list[int], special: bool) -> None:
    whole = SENTENCEPIECE.decode(ids, skip_special_tokens=not special)
    assert "".join(pieces(SENTENCEPIECE, ids, special)) == whole


@pytest.mark.parametrize("name", TOKENIZERS)
@pytest.mark.parametrize("text", ["hello world " * 40, "你好😀é" * 30, " a  ab b" * 40])
def test_long_texts_stream_back(name: str, text: str) -> None:
    tokenizer = TOKENIZERS[name]
    ids = tokenizer.encode(text, add_special_tokens=False).ids
    assert "".join(pieces(tokenizer, ids, False)) == tokenizer.decode(ids)


def test_a_character_cut_across_tokens_appears_once_and_whole() -> None:
    ids = BYTE_LEVEL.encode("a😀b").ids
    assert [p for p in pieces(BYTE_LEVEL, ids, False) if p] == ["a", "😀", "b"]
    ids = [SP(f"<0x{byte:02X}>") for byte in "😀".encode()] + [SP("a")]
    assert [p for p in pieces(SENTENCEPIECE, ids, False) if p] == ["😀a"]


def test_special_tokens_come_in_one_piece_or_not_at_all() -> None:
    ids = BYTE_LEVEL.encode("he<|im_end|><think>he").ids
    assert [p for p in pieces(BYTE_LEVEL, ids, True) if p] == ["he", "<|im_end|>", "<think>", "he"]
    assert [p for p in pieces(BYTE_LEVEL, ids, False) if p] == ["he", "<think>", "he"]


def test_the_window_stays_small() -> None:
    decoder = StreamDecoder(SENTENCEPIECE)
    for _ in range(1000):
        decoder.push(SP("▁ab"))
    assert len(decoder._window) <= 32


STOPS = st.lists(st.text("abc", min_size=1, max_size=4), max_size=3).map(tuple)


def run_matcher(stops: tuple[str, ...], cut: list[str]) -> str:
    matcher = StopMatcher(stops)
    shown = "".join(matcher.push(piece) for piece in cut)
    return shown + matcher.flush()


@given(STOPS, st.lists(st.text("abc", max_size=5), max_size=8))
def test_stop_strings_do_not_depend_on_the_pieces(stops: tuple[str, ...], cut: list[str]) -> None:
    text = "".join(cut)
    expected = text
    for end in range(1, len(text) + 1):
        if hit := [stop for stop in stops if text[:end].endswith(stop)]:
            expected = text[: end - max(map(len, hit))]
            break
    assert run_matcher(stops, cut) == expected
    assert run_matcher(stops, list(text)) == expected


@given(STOPS, st.lists(st.text("abc", max_size=5), max_size=8))
def test_nothing_that_could_begin_a_stop_string_is_shown(stops: tuple[str, ...], cut: list[str]) -> None:
    matcher = StopMatcher(stops)
    shown, fed = "", ""
    for piece in cut:
        fed += piece
        shown += matcher.push(piece)
        if matcher.stopped:
            break
        held = fed[len(shown) :]
        assert not held or any(stop.startswith(held) for stop in stops)
        for stop in stops:
            for size in range(1, len(stop)):
                assert not (fed.endswith(stop[:size]) and len(held) < size)
