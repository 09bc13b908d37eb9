"""Tokenizer and template files of a checkpoint folder."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from cpm_edge.exporter.checkpoint.checkpoint import Assets
from cpm_edge.exporter.checkpoint.files import read_json_object
from cpm_edge.exporter.checkpoint.sentencepiece_tokenizer import convert_sentencepiece, token_text
from cpm_edge.exporter.errors import CheckpointError

COPIED = (
    "tokenizer_config.json",
    "special_tokens_map.json",
    "chat_template.jinja",
    "generation_config.json",
)


def load_folder_assets(folder: Path) -> Assets:
    """Files for the bundle by name; tokenizer.json is made from tokenizer.model where it is absent.

    Raises:
        CheckpointError: neither is there, or tokenizer.model cannot be converted.
    """
    assets: Assets = {name: folder / name for name in COPIED if (folder / name).is_file()}
    if (folder / "tokenizer.json").is_file():
        assets["tokenizer.json"] = folder / "tokenizer.json"
    elif (folder / "tokenizer.model").is_file():
        settings = _settings(folder)
        assets["tokenizer.json"] = convert_sentencepiece(folder / "tokenizer.model", settings)
        if "tokenizer_config.json" not in assets:
            assets["tokenizer_config.json"] = as_json(settings)
    else:
        raise CheckpointError(
            f"no tokenizer: {folder} holds neither tokenizer.json nor tokenizer.model",
            hint="download tokenizer.json and tokenizer_config.json into that folder",
        )
    assets.setdefault("tokenizer_config.json", as_json({}))
    return assets


def as_json(value: dict[str, Any]) -> bytes:
    """UTF-8 JSON, indented, non-ASCII characters kept readable."""
    return (json.dumps(value, ensure_ascii=False, indent=2) + "\n").encode()


def _settings(folder: Path) -> dict[str, Any]:
    """tokenizer_config.json with ``added_tokens_decoder`` filled from the older added_tokens.json."""
    path = folder / "tokenizer_config.json"
    settings: dict[str, Any] = {"tokenizer_class": "LlamaTokenizer"}
    if path.is_file():
        settings = read_json_object(path)
    older = folder / "added_tokens.json"
    if "added_tokens_decoder" not in settings and older.is_file():
        special = _special_tokens(folder, settings)
        settings["added_tokens_decoder"] = {
            str(token_id): {"content": content, "special": content in special}
            for content, token_id in read_json_object(older).items()
        }
    return settings


def _special_tokens(folder: Path, settings: dict[str, Any]) -> set[str | None]:
    path = folder / "special_tokens_map.json"
    named = settings | (read_json_object(path) if path.is_file() else {})
    listed = named.get("additional_special_tokens") or []
    return {token_text(value) for key, value in named.items() if key.endswith("_token")} | {
        token_text(value) for value in listed
    }
