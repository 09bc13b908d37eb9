"""Tokenizer files opened the way a runtime will, before anything is built on them."""

from __future__ import annotations

import json
from pathlib import Path

import tokenizers

from cpm_edge.exporter.checkpoint.checkpoint import Assets
from cpm_edge.exporter.errors import CheckpointError

_AGAIN = "download the tokenizer files of this model again"


def check_tokenizer(assets: Assets, name: str) -> None:
    """Check that the files of a checkpoint can be read.

    Args:
        assets: from ``Checkpoint.assets``.
        name: of the checkpoint, for messages.

    Raises:
        CheckpointError: tokenizer.json is no tokenizer, a JSON file is no object, or text is not UTF-8.
    """
    for file, content in assets.items():
        try:
            text = (content.read_bytes() if isinstance(content, Path) else content).decode()
            valid = not file.endswith(".json") or isinstance(json.loads(text), dict)
        except OSError as error:
            raise CheckpointError(f"{name}: {file} cannot be read: {error.strerror}", hint=_AGAIN) from error
        except (ValueError, RecursionError) as error:
            raise CheckpointError(f"{name}: {file} is damaged: {error}", hint=_AGAIN) from error
        if not valid:
            raise CheckpointError(f"{name}: {file}: expected a JSON object, got another value", hint=_AGAIN)
        if file == "tokenizer.json":
            _open(text, name)


def _open(text: str, name: str) -> None:
    try:
        tokenizers.Tokenizer.from_str(text)
    except Exception as error:  # the library raises nothing narrower
        raise CheckpointError(
            f"{name}: tokenizer.json: tokenizers {tokenizers.__version__} cannot read it: {error}",
            hint=_AGAIN,
        ) from error
