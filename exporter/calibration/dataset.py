"""Calibration text: read, put through the chat template where it is a conversation, cut into sequences."""

from __future__ import annotations

import hashlib
import json
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import tokenizers

from cpm_edge.exporter.calibration.settings import SEQUENCE, Settings
from cpm_edge.exporter.checkpoint import Checkpoint
from cpm_edge.exporter.errors import ExportError, ExportWarning
from cpm_edge.runtimes.chat import ChatTemplate
from cpm_edge.runtimes.errors import CpmEdgeError
from cpm_edge.runtimes.tokenizer import Tokenizer

DEFAULT = "default"
LEAST_TOKENS = 32  # fewer say nothing about a layer's inputs
MAX_BYTES = 1 << 30
_FORMATS = 'expected UTF-8 text, or JSON lines with {"text": ...} or {"messages": [{"role", "content"}, ...]}'


@dataclass(frozen=True)
class Sequences:
    """What goes through the model.

    Attributes:
        ids: int64 (sequences, length).
        name: of the text: its file, or ``default``.
        sha256: of the text.
    """

    ids: npt.NDArray[np.int64]
    name: str
    sha256: str

    @property
    def tokens(self) -> int:
        return int(self.ids.size)


def read_sequences(
    path: Path | None, checkpoint: Checkpoint, settings: Settings, vocab_size: int, longest: int
) -> Sequences:
    """Tokens of a text or JSON lines file, or of the text that comes with this package.

    All documents follow each other; sequences of SEQUENCE tokens are cut from that. Of a long text
    some are chosen at random by the seed. A text that is shorter than one becomes one sequence.

    Warns with ExportWarning when the text has fewer tokens than asked for.

    Raises:
        ExportError: the file is missing, empty, not text, malformed JSON, or too short.
    """
    name = DEFAULT if path is None else path.name
    text = default_text() if path is None else _read(path)
    tokenizer, template = _tokenizer(checkpoint)
    ids: list[int] = []
    lines = path is not None and path.suffix.lower() in (".jsonl", ".json")
    for where, document in _documents(text, f"--dataset {name}", lines):
        ids += tokenizer.encode(_as_text(document, template, where))
    ids = [token for token in ids if token < vocab_size]
    length = min(SEQUENCE, longest, settings.tokens, len(ids))
    if length < min(LEAST_TOKENS, longest):
        raise ExportError(
            f"--dataset {name}: expected at least {LEAST_TOKENS} tokens, got {len(ids)}",
            hint="a few thousand words of the kind that the model will meet are a good start",
        )
    sequences = np.array(ids[: len(ids) // length * length], np.int64).reshape(-1, length)
    wanted = max(settings.tokens // length, 1)
    if len(sequences) > wanted:
        chosen = np.random.default_rng(settings.seed).permutation(len(sequences))[:wanted]
        sequences = sequences[np.sort(chosen)]
    elif path is not None and len(sequences) < wanted:
        message = f"--dataset {name} has {sequences.size} tokens of the {settings.tokens} asked for"
        warnings.warn(message, ExportWarning, stacklevel=2)
    return Sequences(sequences, name, hashlib.sha256(text.encode()).hexdigest())


def default_text() -> str:
    """The text of this package: English and Chinese prose, dialogue, reference, arithmetic and code."""
    return (resources.files("cpm_edge.exporter.calibration") / "default.txt").read_text(encoding="utf-8")


def _read(path: Path) -> str:
    try:
        if path.stat().st_size > MAX_BYTES:
            raise ExportError(f"--dataset {path}: expected a file of at most {MAX_BYTES >> 20} MiB")
        text = path.read_text(encoding="utf-8-sig")
    except OSError as error:
        raise ExportError(f"--dataset {path}: cannot be read: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise ExportError(f"--dataset {path}: not UTF-8 at byte {error.start}", hint=_FORMATS) from error
    if not text.strip():
        raise ExportError(f"--dataset {path}: the file is empty", hint=_FORMATS)
    return text


def _documents(text: str, name: str, lines: bool) -> Iterator[tuple[str, str | list[Mapping[str, Any]]]]:
    """Texts and conversations of a file, each with its place for error messages."""
    if not lines:
        yield name, text
        return
    for number, line in enumerate(text.split("\n"), 1):  # JSON strings may hold other line separators
        if not line.strip():
            continue
        try:
            value = json.loads(line)
        except (json.JSONDecodeError, RecursionError) as error:
            raise ExportError(f"{name}, line {number}: not JSON: {error}", hint=_FORMATS) from error
        yield f"{name}, line {number}", _content_of(value, f"{name}, line {number}")


def _content_of(value: Any, where: str) -> str | list[Mapping[str, Any]]:
    """The text of a line, or its conversation."""
    entry = value if isinstance(value, dict) else {}
    text, messages = entry.get("text"), entry.get("messages")
    if isinstance(messages, list) and messages:
        for index, message in enumerate(messages):
            if not _is_message(message):
                expected = "expected {'role': ..., 'content': ...}"
                raise ExportError(
                    f"{where}: messages[{index}]: {expected}, got {message!r:.80}", hint=_FORMATS
                )
        return messages
    if messages is None and isinstance(text, str) and text:
        return text
    raise ExportError(f"{where}: no text and no messages", hint=_FORMATS)


def _is_message(value: Any) -> bool:
    """Whether a template can read it: contents are texts, lists of parts, or null beside tool calls."""
    if not isinstance(value, dict) or not isinstance(value.get("role"), str):
        return False
    content = value.get("content")
    return isinstance(content, str | list) or (content is None and bool(value.get("tool_calls")))


def _as_text(document: str | list[Mapping[str, Any]], template: ChatTemplate | None, where: str) -> str:
    if isinstance(document, str):
        return document
    if template is None:
        raise ExportError(
            f"{where}: a conversation, and the checkpoint has no chat template",
            hint='give lines of {"text": ...} instead',
        )
    try:
        return template.render(document)
    except CpmEdgeError as error:
        raise ExportError(
            f"{where}: {error.message}", hint="leave the conversation out, or give its text"
        ) from error


def _tokenizer(checkpoint: Checkpoint) -> tuple[Tokenizer, ChatTemplate | None]:
    assets = {name: _content(value) for name, value in checkpoint.assets().items()}
    config = json.loads(assets["tokenizer_config.json"])
    backend = tokenizers.Tokenizer.from_buffer(assets["tokenizer.json"])
    tokenizer = Tokenizer(backend, config)
    source = assets.get("chat_template.jinja", b"").decode() or config.get("chat_template") or []
    sources = {"default": source} if isinstance(source, str) else {i["name"]: i["template"] for i in source}
    return tokenizer, ChatTemplate(sources, tokenizer.special_tokens) if sources else None


def _content(value: bytes | Path) -> bytes:
    return value if isinstance(value, bytes) else value.read_bytes()
