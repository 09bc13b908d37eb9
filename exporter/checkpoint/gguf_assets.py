"""Tokenizer and template files for a GGUF checkpoint: files beside it, else what its metadata holds."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer

from cpm_edge.exporter.checkpoint.checkpoint import Assets
from cpm_edge.exporter.checkpoint.folder_assets import COPIED, as_json
from cpm_edge.exporter.checkpoint.gguf_tokenizer import build_gguf_tokenizer, token_types, tokenizer_settings
from cpm_edge.exporter.checkpoint.spm_tokenizer import PieceType
from cpm_edge.exporter.errors import CheckpointError

HINT = "put tokenizer.json and tokenizer_config.json of the original model beside the GGUF file"
MIN_EQUAL_TOKENS = 0.9  # converters respell a few tokens; another model's vocabulary shares far fewer


def load_gguf_assets(path: Path, metadata: Mapping[str, Any], generation_config: dict[str, Any]) -> Assets:
    """Files for the bundle by name.

    A tokenizer.json beside the GGUF file wins, with its siblings: it is how a user overrules the
    metadata. It must hold the tokens that the metadata lists.

    Raises:
        CheckpointError: no tokenizer, or one of another model; says why.
    """
    beside = path.parent / "tokenizer.json"
    assets: Assets = {}
    template = metadata.get("tokenizer.chat_template")
    if isinstance(template, str) and template:
        assets["chat_template.jinja"] = template.encode()
    assets["tokenizer_config.json"] = as_json(tokenizer_settings(metadata))
    assets["generation_config.json"] = as_json(generation_config)
    if beside.is_file():
        _check_vocabulary(beside, metadata)
        if (path.parent / "tokenizer_config.json").is_file():
            assets.pop("chat_template.jinja", None)  # that file may hold a template of its own
        assets["tokenizer.json"] = beside
        assets |= {name: path.parent / name for name in COPIED if (path.parent / name).is_file()}
        return assets
    try:
        assets["tokenizer.json"] = build_gguf_tokenizer(metadata).to_str().encode()
    except CheckpointError as error:
        raise CheckpointError(f"{path}: no usable tokenizer: {error.message}", hint=HINT) from error
    return assets


def _check_vocabulary(tokenizer_path: Path, metadata: Mapping[str, Any]) -> None:
    """Compare the normal tokens with those that the metadata lists."""
    tokens = metadata.get("tokenizer.ggml.tokens", [])
    types = token_types(metadata, tokens)
    try:
        tokenizer = Tokenizer.from_str(tokenizer_path.read_text(encoding="utf-8"))
    except Exception as error:  # the library raises nothing more specific
        raise CheckpointError(f"{tokenizer_path}: not a readable tokenizer: {error}", hint=HINT) from error
    normal = [index for index, kind in enumerate(types) if kind == PieceType.NORMAL]
    equal = sum(tokenizer.id_to_token(index) == tokens[index] for index in normal)
    if equal < MIN_EQUAL_TOKENS * len(normal):
        raise CheckpointError(
            f"{tokenizer_path} is of another model: {equal} of {len(normal)} tokens agree with the GGUF file",
            hint=HINT,
        )
