"""A tokenizer rebuilt from GGUF metadata, when the file holds all of it."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from tokenizers import AddedToken, Tokenizer, decoders, models

from cpm_edge.exporter.checkpoint.gguf_pre_tokenizers import (
    PreTokenizer,
    build_pre_tokenizer,
    find_pre_tokenizer,
)
from cpm_edge.exporter.checkpoint.spm_tokenizer import (
    PieceType,
    SpmOptions,
    Vocabulary,
    add_tokens,
    build_spm,
    set_template,
)
from cpm_edge.exporter.errors import CheckpointError

CONTROL_SHAPE = re.compile(r"<\|[^\s<>|]+\|>")
SPECIAL_TOKENS = {"bos_token": "bos", "eos_token": "eos", "unk_token": "unknown", "pad_token": "padding"}


def build_gguf_tokenizer(metadata: Mapping[str, Any]) -> Tokenizer:
    """The tokenizer of ``tokenizer.ggml.*``; models ``gpt2`` (byte-level BPE) and ``llama`` (SentencePiece).

    Raises:
        CheckpointError: says which part is missing, contradictory or unknown.
    """
    model = metadata.get("tokenizer.ggml.model")
    tokens = _strings(metadata, "tokens")
    types = token_types(metadata, tokens)
    if model == "gpt2":
        tokenizer = _byte_level(metadata, tokens, types)
    elif model == "llama":
        tokenizer = _sentencepiece(metadata, tokens, types)
    else:
        raise CheckpointError(f"tokenizer.ggml.model: expected gpt2 or llama, got {model!r}")
    settings = tokenizer_settings(metadata)
    set_template(
        tokenizer,
        settings.get("bos_token") if settings["add_bos_token"] else None,
        settings.get("eos_token") if settings["add_eos_token"] else None,
    )
    return tokenizer


def token_types(metadata: Mapping[str, Any], tokens: Sequence[str]) -> list[int]:
    """The type of every token; those that only control text are marked so where a converter did not.

    Some files call ``<|im_start|>`` a normal token; it would then be cut into pieces. No byte pair
    encoding learns a token of that shape.

    Raises:
        CheckpointError: not one type per token.
    """
    types = list(metadata.get("tokenizer.ggml.token_type", [PieceType.NORMAL] * len(tokens)))
    if len(types) != len(tokens):
        raise CheckpointError(f"tokenizer.ggml.token_type: expected {len(tokens)} entries, got {len(types)}")
    named = {metadata.get(f"tokenizer.ggml.{key}_token_id") for key in ("bos", "eos", "eot", "eom")}
    for index, token in enumerate(tokens):
        if types[index] == PieceType.NORMAL and (index in named or CONTROL_SHAPE.fullmatch(token)):
            types[index] = PieceType.CONTROL
    return types


def tokenizer_settings(metadata: Mapping[str, Any]) -> dict[str, Any]:
    """The content of tokenizer_config.json; the chat template is kept in a file of its own."""
    tokens = metadata.get("tokenizer.ggml.tokens", [])
    settings: dict[str, Any] = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "add_bos_token": bool(metadata.get("tokenizer.ggml.add_bos_token", _add_bos_default(metadata))),
        "add_eos_token": bool(metadata.get("tokenizer.ggml.add_eos_token", False)),
        "clean_up_tokenization_spaces": False,
    }
    for name, key in SPECIAL_TOKENS.items():
        token_id = metadata.get(f"tokenizer.ggml.{key}_token_id")
        if isinstance(token_id, int) and 0 <= token_id < len(tokens):
            settings[name] = tokens[token_id]
    context = metadata.get(f"{metadata.get('general.architecture')}.context_length")
    return settings | ({"model_max_length": context} if isinstance(context, int) else {})


def _byte_level(metadata: Mapping[str, Any], tokens: list[str], types: Sequence[int]) -> Tokenizer:
    pre = find_pre_tokenizer(metadata.get("tokenizer.ggml.pre", "default"))
    vocabulary = Vocabulary(tokens, [0.0] * len(tokens), types)
    ids = vocabulary.ids()
    merges = _merges(metadata, ids)
    tokenizer = Tokenizer(models.BPE(vocab=ids, merges=merges, ignore_merges=pre.ignore_merges))
    tokenizer.pre_tokenizer = build_pre_tokenizer(pre)
    tokenizer.decoder = decoders.ByteLevel()
    special = {PieceType.CONTROL: True, PieceType.USER_DEFINED: False}
    add_tokens(
        tokenizer,
        [
            (index, AddedToken(token, normalized=False, special=special[PieceType(kind)]))
            for index, (token, kind) in enumerate(zip(tokens, types, strict=True))
            if kind in special
        ],
    )
    return tokenizer


def _merges(metadata: Mapping[str, Any], ids: Mapping[str, int]) -> list[tuple[str, str]]:
    merges = []
    for merge in _strings(metadata, "merges"):
        left, _, right = merge.partition(" ")
        if left not in ids or right not in ids or left + right not in ids:
            raise CheckpointError(
                f"tokenizer.ggml.merges: {merge!r} does not join two tokens of the vocabulary"
            )
        merges.append((left, right))
    return merges


def _sentencepiece(metadata: Mapping[str, Any], tokens: list[str], types: Sequence[int]) -> Tokenizer:
    scores = metadata.get("tokenizer.ggml.scores")
    if not isinstance(scores, list) or len(scores) != len(tokens):
        raise CheckpointError(f"tokenizer.ggml.scores: expected {len(tokens)} entries, one per token")
    unknown = metadata.get("tokenizer.ggml.unknown_token_id", 0)
    options = SpmOptions(
        unk_token=tokens[unknown] if 0 <= unknown < len(tokens) else "<unk>",
        byte_fallback=PieceType.BYTE in types,
        add_prefix_space=bool(metadata.get("tokenizer.ggml.add_space_prefix", True)),
        charsmap=bytes(metadata.get("tokenizer.ggml.precompiled_charsmap", b"")),
    )
    return build_spm(Vocabulary(tokens, scores, types), options)


def _strings(metadata: Mapping[str, Any], key: str) -> list[str]:
    values = metadata.get(f"tokenizer.ggml.{key}")
    if not isinstance(values, list) or not values or not all(isinstance(value, str) for value in values):
        raise CheckpointError(f"tokenizer.ggml.{key} is missing")
    return values


def _add_bos_default(metadata: Mapping[str, Any]) -> bool:
    """llama.cpp's: SentencePiece vocabularies and Llama 3 begin with BOS unless the file says no."""
    if metadata.get("tokenizer.ggml.model") == "llama":
        return True
    try:
        pre: PreTokenizer | None = find_pre_tokenizer(metadata.get("tokenizer.ggml.pre", "default"))
    except CheckpointError:
        pre = None
    return pre is not None and pre.add_bos
