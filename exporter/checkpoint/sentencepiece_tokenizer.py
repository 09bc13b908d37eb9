"""tokenizer.model (SentencePiece BPE) converted to tokenizer.json."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tokenizers import AddedToken

from cpm_edge.exporter.checkpoint.spm_tokenizer import SpmOptions, Vocabulary, build_spm, set_template
from cpm_edge.exporter.errors import CheckpointError

BPE_MODEL = 2  # TrainerSpec.ModelType
HINT = "put a tokenizer.json of the same model into the folder"


def convert_sentencepiece(path: Path, settings: Mapping[str, Any]) -> bytes:
    """The content of tokenizer.json for a SentencePiece BPE model.

    Args:
        path: tokenizer.model.
        settings: tokenizer_config.json; ``added_tokens_decoder``, ``bos_token``, ``add_bos_token``
            (True when absent, as for Llama), ``eos_token``, ``add_eos_token`` and ``legacy`` are used.

    Raises:
        CheckpointError: not a SentencePiece BPE model, or added tokens that do not fit it.
    """
    proto = _read_proto(path)
    if proto.trainer_spec.model_type != BPE_MODEL:
        raise CheckpointError(f"{path}: expected a SentencePiece model of type BPE", hint=HINT)
    if proto.trainer_spec.treat_whitespace_as_suffix or not proto.normalizer_spec.escape_whitespaces:
        raise CheckpointError(f"{path}: whitespace as suffix or unescaped is not supported", hint=HINT)
    vocabulary = Vocabulary(
        pieces=[piece.piece for piece in proto.pieces],
        scores=[piece.score for piece in proto.pieces],
        types=[piece.type for piece in proto.pieces],
    )
    options = SpmOptions(
        unk_token=proto.trainer_spec.unk_piece,
        byte_fallback=proto.trainer_spec.byte_fallback,
        add_prefix_space=settings.get("add_prefix_space", proto.normalizer_spec.add_dummy_prefix),
        legacy=settings.get("legacy") is not False,
        collapse_spaces=proto.normalizer_spec.remove_extra_whitespaces,
        charsmap=proto.normalizer_spec.precompiled_charsmap,
        added=_added_tokens(path, settings),
    )
    try:
        tokenizer = build_spm(vocabulary, options)
        bos = token_text(settings.get("bos_token")) or proto.trainer_spec.bos_piece
        eos = token_text(settings.get("eos_token")) or proto.trainer_spec.eos_piece
        set_template(
            tokenizer,
            bos if settings.get("add_bos_token", True) else None,
            eos if settings.get("add_eos_token", False) else None,
        )
    except CheckpointError as error:
        raise CheckpointError(f"{path}: {error.message}", hint=HINT) from error
    return tokenizer.to_str().encode()


def token_text(token: Any) -> str | None:
    """A token as tokenizer_config.json writes it: text, or an object with ``content``."""
    if isinstance(token, dict):
        token = token.get("content")
    return token if isinstance(token, str) and token else None


def _read_proto(path: Path) -> Any:
    try:
        from google.protobuf.message import DecodeError  # type: ignore[import-untyped]
        from sentencepiece import sentencepiece_model_pb2
    except ImportError as error:
        raise CheckpointError(
            f"{path}: converting it needs the packages sentencepiece and protobuf",
            hint='pip install "cpm-edge[export]", or add a tokenizer.json',
        ) from error
    proto: Any = sentencepiece_model_pb2.ModelProto()  # type: ignore[attr-defined]
    try:
        proto.ParseFromString(path.read_bytes())
    except DecodeError as error:
        raise CheckpointError(f"{path}: not a SentencePiece model: {error}", hint=HINT) from error
    if not proto.pieces:
        raise CheckpointError(f"{path}: a SentencePiece model without pieces", hint=HINT)
    return proto


def _added_tokens(path: Path, settings: Mapping[str, Any]) -> list[tuple[int, AddedToken]]:
    tokens = []
    for token_id, entry in settings.get("added_tokens_decoder", {}).items():
        content = token_text(entry)
        if content is None or not str(token_id).isdecimal():
            raise CheckpointError(
                f"{path.parent}: added_tokens_decoder: expected id: {{content}}, got {entry}"
            )
        flags = {
            key: bool(entry.get(key, False)) for key in ("lstrip", "rstrip", "single_word", "normalized")
        }
        tokens.append(
            (int(token_id), AddedToken(content, special=bool(entry.get("special", False)), **flags))
        )
    return tokens
