"""A MiniCPM checkpoint under a Llama config, for exporters that do not know MiniCPM.

optimum-intel exports plain MiniCPM only through remote code for old transformers.
"""

from __future__ import annotations

import json
from pathlib import Path

_MUP = ("scale_emb", "scale_depth", "dim_model_base", "rope_scaling")


def as_llama(source: Path, folder: Path) -> None:
    """The same weight files under a Llama config of equal dimensions."""
    folder.mkdir()
    for path in source.iterdir():
        if path.name != "config.json":
            (folder / path.name).symlink_to(path)
    config = json.loads((source / "config.json").read_text())
    for key in _MUP:
        config.pop(key, None)
    config |= {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "torch_dtype": "bfloat16"}
    (folder / "config.json").write_text(json.dumps(config))
