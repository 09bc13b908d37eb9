"""Calibration text: what is read, how it is cut, and what is refused."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest

from cpm_edge.exporter.calibration.dataset import Sequences, default_text, read_sequences
from cpm_edge.exporter.calibration.settings import SEQUENCE, Settings
from cpm_edge.exporter.checkpoint import open_checkpoint
from cpm_edge.exporter.errors import ExportError, ExportWarning
from tests.exporter.calibration.conftest import Bench
from tests.support.checkpoints import VOCAB

WORDS = " ".join(f"line {number} of some text" for number in range(400))


def read(bench: Bench, path: Path | None, tokens: int = 1024, seed: int = 0) -> Sequences:
    with open_checkpoint(str(bench.checkpoint("llama"))) as checkpoint:
        return read_sequences(path, checkpoint, Settings("gptq", tokens, seed=seed), VOCAB, 1024)


def test_the_default_text(bench: Bench) -> None:
    result = read(bench, None, 10**6)
    assert result.name == "default"
    assert result.ids.shape[1] == SEQUENCE
    assert result.tokens > 8000
    text = default_text()
    assert all(part in text for part in ("def ", "天空", "SELECT", "Assistant:"))


def test_a_long_text_is_sampled_by_the_seed(bench: Bench, tmp_path: Path) -> None:
    path = tmp_path / "long.txt"
    path.write_text(WORDS)
    whole = read_quietly(bench, path)
    first, again, other = (read(bench, path, 3 * SEQUENCE, seed) for seed in (0, 0, 1))
    assert first.ids.shape == (3, SEQUENCE)
    np.testing.assert_array_equal(first.ids, again.ids)
    assert (first.ids != other.ids).any()
    rows = {row.tobytes() for row in whole.ids}
    assert all(row.tobytes() in rows for row in first.ids)
    assert first.sha256 == other.sha256


def read_quietly(bench: Bench, path: Path) -> Sequences:
    with pytest.warns(ExportWarning, match="tokens of the 100000 asked for"):
        return read(bench, path, 100_000)


def test_a_text_shorter_than_a_sequence_is_one(bench: Bench, tmp_path: Path) -> None:
    path = tmp_path / "short.txt"
    path.write_text(WORDS[:150])
    with pytest.warns(ExportWarning, match="short.txt has 1.. tokens of the 1024 asked for"):
        result = read(bench, path)
    assert len(result.ids) == 1
    assert 32 <= result.ids.shape[1] <= 150


def test_fewer_tokens_than_a_sequence_are_asked_for(bench: Bench) -> None:
    assert read(bench, None, 40).ids.shape == (1, 40)


def test_lines_end_at_line_feeds_alone_and_a_byte_order_mark_is_none_of_them(
    bench: Bench, tmp_path: Path
) -> None:
    path = tmp_path / "lines.jsonl"
    texts = [WORDS + "\u2028", "\x85" + WORDS]
    lines = "\r\n".join(json.dumps({"text": text}, ensure_ascii=False) for text in texts)
    path.write_bytes(b"\xef\xbb\xbf" + lines.encode())
    joined = tmp_path / "joined.txt"
    joined.write_text("".join(texts), encoding="utf-8", newline="")
    np.testing.assert_array_equal(read_quietly(bench, path).ids, read_quietly(bench, joined).ids)


def test_conversations_go_through_the_template(bench: Bench, tmp_path: Path) -> None:
    path = tmp_path / "chats.jsonl"
    lines = [
        {"messages": [{"role": "user", "content": WORDS[:600]}, {"role": "assistant", "content": "Yes."}]},
        {"text": WORDS[600:900]},
    ]
    path.write_text("\n\n".join(json.dumps(line) for line in lines))
    ids = read(bench, path, 64).ids
    with open_checkpoint(str(bench.checkpoint("llama"))) as checkpoint:
        asset = checkpoint.assets()["tokenizer.json"]
    assert isinstance(asset, Path)
    starts = json.loads(asset.read_text())["added_tokens"]
    marker = next(token["id"] for token in starts if token["content"] == "<|im_start|>")
    with pytest.warns(ExportWarning):
        assert marker in read(bench, path, 5000).ids
    assert ids.shape == (1, 64)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("empty.txt", b"  \n", "the file is empty"),
        ("tiny.txt", b"a few words", "expected at least 32 tokens, got 9"),
        ("binary.txt", b"\xff\xfe\x00text", "not UTF-8 at byte 0"),
        ("broken.jsonl", b'{"text": "fine"}\n{"text": ', "line 2: not JSON"),
        ("other.jsonl", b'{"prompt": "x"}', "line 1: no text and no messages"),
        ("list.jsonl", b'["text"]', "line 1: no text and no messages"),
        ("string.jsonl", b'{"messages": "Hello"}', "line 1: no text and no messages"),
        (
            "roles.jsonl",
            b'{"text": "x"}\n{"messages": [{"content": "no role"}]}',
            r"line 2: messages\[0\]: expected",
        ),
        (
            "number.jsonl",
            b'{"messages": [{"role": "user", "content": 42}]}',
            r"line 1: messages\[0\]: expected",
        ),
        (
            "none.jsonl",
            b'{"messages": [{"role": "user", "content": null}]}',
            r"line 1: messages\[0\]: expected",
        ),
    ],
)
def test_what_is_refused(bench: Bench, tmp_path: Path, name: str, content: bytes, message: str) -> None:
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(ExportError, match=message):
        read(bench, path)


def test_a_conversation_that_the_template_refuses_is_named_by_its_line(bench: Bench, tmp_path: Path) -> None:
    path = tmp_path / "chats.jsonl"
    path.write_text("\n" + json.dumps({"messages": [{"role": "user", "content": "Hello"}]}))
    folder = shutil.copytree(bench.checkpoint("llama"), tmp_path / "strict")
    tokenizer = json.loads((folder / "tokenizer_config.json").read_text())
    tokenizer["chat_template"] = "{{ raise_exception('no system prompt') }}"
    (folder / "tokenizer_config.json").write_text(json.dumps(tokenizer))
    with (
        open_checkpoint(str(folder)) as checkpoint,
        pytest.raises(ExportError, match=r"line 2: .* no system prompt") as caught,
    ):
        read_sequences(path, checkpoint, Settings("gptq", 1024), VOCAB, 1024)
    assert caught.value.hint == "leave the conversation out, or give its text"


def test_a_file_that_is_not_there(bench: Bench, tmp_path: Path) -> None:
    with pytest.raises(ExportError, match="cannot be read: No such file"):
        read(bench, tmp_path / "none.txt")
