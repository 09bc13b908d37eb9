"""Stand-ins that need no engine and no model: a deterministic session, tiny tokenizers, a bundle on disk."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers

from cpm_edge.runtimes.bundle import ContextLimits, Manifest, hash_files, write_manifest
from cpm_edge.runtimes.session import Engine, FloatArray, Logits, Session, TokenArray

CHATML = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


class FakeSession(Session):
    """Logits depend on every token in the cache, so a wrong cache gives wrong logits.

    Args:
        answer: if given, the token ids that the logits favour one after the other, starting at the position
            where the prompt ended.
    """

    def __init__(
        self,
        vocab_size: int,
        max_context: int = 64,
        chunk: Callable[[int], int] = lambda position: 4,
        answer: Sequence[int] | None = None,
    ) -> None:
        super().__init__(max_context=max_context, vocab_size=vocab_size, prefill_chunk=chunk)
        self.chunk = chunk
        self.answer = answer
        self.prompt_length: int | None = None
        self.cache: list[int] = []
        self.steps: list[int] = []
        self.released = False
        self.fail_at: tuple[int, BaseException] | None = None

    def _step(self, tokens: TokenArray, logits: Logits) -> FloatArray:
        self.steps.append(len(tokens))
        rows = []
        for token in tokens.tolist():
            self.cache.append(token)
            if self.fail_at and len(self.cache) > self.fail_at[0]:
                error, self.fail_at = self.fail_at[1], None
                raise error
            rows.append(self._row())
        return np.stack(rows if logits == "all" else rows[-1:])

    def _row(self) -> FloatArray:
        row = reference_row(self.cache, self.vocab_size)
        if self.answer is not None and self.prompt_length is not None:
            index = len(self.cache) - self.prompt_length
            if 0 <= index < len(self.answer):
                row[self.answer[index]] = 100
        return row

    def forward(self, token_ids: Any, logits: Logits = "last") -> FloatArray:
        if self.prompt_length is None:
            self.prompt_length = self.position + len(token_ids)
        return super().forward(token_ids, logits)

    def rewind(self, n: int) -> None:
        super().rewind(n)
        self.prompt_length = None

    def _truncate(self, position: int) -> None:
        del self.cache[position:]

    def _clone(self) -> Session:
        twin = FakeSession(self.vocab_size, self.max_context, self.chunk, self.answer)
        twin.cache = list(self.cache)
        return twin

    def _close(self) -> None:
        self.released = True

    def cache_bytes(self) -> int:
        return 8 * len(self.cache)


def reference_row(cache: Sequence[int], vocab_size: int) -> FloatArray:
    """The logits of FakeSession after exactly these tokens."""
    seed = 17
    for token in cache:
        seed = (seed * 31 + token + 1) % (2**31)
    return np.random.default_rng(seed).standard_normal(vocab_size).astype(np.float32)


class FakeEngine(Engine):
    """Hands out FakeSessions and remembers them."""

    def __init__(self, vocab_size: int, **session: Any) -> None:
        self.vocab_size = vocab_size
        self.options = session
        self.sessions: list[FakeSession] = []
        self.closed = False

    def session(self) -> FakeSession:
        self.sessions.append(FakeSession(self.vocab_size, **self.options))
        return self.sessions[-1]

    def info(self) -> dict[str, Any]:
        return {"engine": "fake", "version": "1.0", "device": "CPU", "threads": 1, "max_context": 64}

    def close(self) -> None:
        self.closed = True


def byte_level_tokenizer() -> Tokenizer:
    """Every byte, a few merges, special tokens, and one added that is not special: MiniCPM5's kind."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {"<s>": 0, "</s>": 1} | {piece: index + 2 for index, piece in enumerate(alphabet)}
    merges = [("Ġ", "w"), ("Ġw", "o"), ("h", "e"), ("ä", "½"), ("½", "ł")]
    for left, right in merges:
        vocab[left + right] = len(vocab)
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=merges))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(["<s>", "</s>", "<|im_start|>", "<|im_end|>"])
    tokenizer.add_tokens([AddedToken("<think>", special=False, normalized=False)])
    return tokenizer


def sentencepiece_tokenizer() -> Tokenizer:
    """Byte fallback, a prepended space, a decoder that strips it: MiniCPM 3 and 4."""
    pieces = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    pieces += [
        "▁",
        "▁▁",
        "a",
        "b",
        "▁a",
        "▁b",
        "ab",
        "▁ab",
        "你",
        "好",
        ".",
        "\ufffd",
        "h",
        "e",
        "he",
        "▁he",
        "",
    ]
    vocab = {piece: index for index, piece in enumerate(pieces)}
    merges = [("▁", "a"), ("▁", "b"), ("a", "b"), ("▁a", "b"), ("▁", "▁"), ("h", "e"), ("▁", "he")]
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=merges, unk_token="<unk>", byte_fallback=True))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    tokenizer.add_special_tokens(["<unk>", "<s>", "</s>", "<|im_end|>", "<|im_start|>"])
    return tokenizer


def manifest(files: dict[str, Any], **changes: Any) -> Manifest:
    """A valid manifest over these files."""
    fields: dict[str, Any] = {
        "producer": "cpm-edge 0.1.0",
        "target": "ort",
        "architecture": "llama",
        "vocab_size": 300,
        "hidden_size": 8,
        "num_layers": 2,
        "context": ContextLimits(max_context=64),
        "engine": {"name": "onnxruntime", "version": "1.32.0", "requires": ">=1.24"},
    }
    return Manifest(**(fields | changes), files=files)


def make_bundle(
    folder: Path, texts: Mapping[str, Any] | None = None, model: bool = True, **changes: Any
) -> Path:
    """A bundle whose model is a few bytes of nothing, for use with FakeEngine.

    Args:
        texts: contents of JSON files, instead of the usual ones.
        model: write those bytes; False where the folder holds a model already.
        changes: fields of the manifest.
    """
    folder.mkdir(parents=True, exist_ok=True)
    if model:
        (folder / "model.onnx").write_bytes(b"not really a model")
    byte_level_tokenizer().save(str(folder / "tokenizer.json"))
    usual = {
        "config.json": {"eos_token_id": 1},
        "generation_config.json": {"eos_token_id": [1]},
        "tokenizer_config.json": {"bos_token": "<s>", "eos_token": "</s>", "chat_template": CHATML},
    }
    for name, value in (usual | dict(texts or {})).items():
        (folder / name).write_text(json.dumps(value), encoding="utf-8")
    write_manifest(folder, manifest(hash_files(folder), **changes))
    return folder
