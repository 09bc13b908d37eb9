"""openvino_tokenizer.xml and openvino_detokenizer.xml, for openvino_genai and OpenVINO Model Server."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from cpm_edge.exporter.disk import openvino_disk_errors
from cpm_edge.exporter.errors import CheckpointError
from cpm_edge.runtimes.errors import missing_dependency

TOKENIZER = "openvino_tokenizer.xml"
DETOKENIZER = "openvino_detokenizer.xml"
_SPECIAL = ("bos_token", "eos_token", "unk_token", "pad_token")


def write_tokenizer(folder: Path) -> None:
    """Convert the bundle's tokenizer.json; our own runtime does not need the result.

    Raises:
        BackendError: openvino-tokenizers or transformers is not installed.
    """
    import openvino as ov

    try:
        from openvino_tokenizers import convert_tokenizer
    except ImportError as error:
        raise missing_dependency("openvino_tokenizers", "aipc") from error
    try:
        # Only the class that wraps tokenizer.json: no model code, no code of the checkpoint.
        from transformers import PreTrainedTokenizerFast
    except ImportError as error:
        raise missing_dependency("transformers", "export") from error
    settings = json.loads((folder / "tokenizer_config.json").read_text(encoding="utf-8"))
    special = {key: _text(settings[key]) for key in _SPECIAL if settings.get(key)}
    tokenizer = PreTrainedTokenizerFast(tokenizer_file=str(folder / "tokenizer.json"), **special)
    template = folder / "chat_template.jinja"
    if template.is_file():
        tokenizer.chat_template = template.read_text(encoding="utf-8")
    elif isinstance(settings.get("chat_template"), str):
        tokenizer.chat_template = settings["chat_template"]
    models = convert_tokenizer(tokenizer, with_detokenizer=True, skip_special_tokens=True)
    for model, name in zip(models, (TOKENIZER, DETOKENIZER), strict=True):
        with openvino_disk_errors(folder / name):
            ov.save_model(model, str(folder / name))


def _text(token: Any) -> str:
    """Token entries are strings or objects with a content."""
    if isinstance(token, dict):
        token = token.get("content")
    if not isinstance(token, str):
        raise CheckpointError(
            f"tokenizer_config.json: expected a token's text, got {token!r}",
            hint="correct the special tokens of the checkpoint's tokenizer_config.json",
        )
    return token
