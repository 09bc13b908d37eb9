"""The shape of a model to measure: a config.json without weights."""

from __future__ import annotations

import difflib
import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from cpm_edge.benchmarks.errors import BenchError

FOLDER = Path(__file__).parent / "shapes"


@dataclass(frozen=True)
class Shape:
    """A name for reports and the content of a config.json."""

    name: str
    config: dict[str, Any]

    @classmethod
    def open(cls, name: str) -> Shape:
        """One of ``shape_names()``, or the path of a config.json.

        Raises:
            BenchError: neither.
        """
        path = FOLDER / f"{name}.json" if name in shape_names() else Path(name)
        if not path.is_file():
            raise _no_shape(name)
        try:
            config = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise BenchError(
                f"shape: expected a model's config.json, got {name}: {error}", hint="check the file"
            ) from error
        if not isinstance(config, dict) or "architectures" not in config:
            raise BenchError(
                f"shape: expected a model's config.json, got {name} without architectures",
                hint="give the config.json that lies beside a checkpoint's weights",
            )
        return cls(path.stem, config)

    def changed(self, *, layers: int | None = None, context: int = 0) -> Shape:
        """The same with fewer decoder layers, and with positions for at least ``context`` tokens."""
        config = dict(self.config)
        if layers is not None:
            config["num_hidden_layers"] = layers
            if "mixer_types" in config:
                config["mixer_types"] = config["mixer_types"][:layers]
        config["max_position_embeddings"] = max(config["max_position_embeddings"], context)
        return replace(self, config=config)

    def parsed(self) -> Any:
        """The exporter's config object.

        Raises:
            ConfigError: the exporter does not know such a model.
        """
        from cpm_edge.exporter.registry import find_architecture

        return find_architecture(self.config).config.from_dict(self.config)

    @property
    def vocab_size(self) -> int:
        return int(self.config["vocab_size"])


def shape_names() -> list[str]:
    """The shapes that come with the benchmarks."""
    return sorted(path.stem for path in FOLDER.glob("*.json"))


def _no_shape(name: str) -> BenchError:
    """What to say of a name that is neither known nor a file."""
    known = shape_names()
    close = difflib.get_close_matches(name, known, 1, cutoff=0.7)
    if Path(name).is_dir():
        fault, hint = "a folder", f"give the file in it: {Path(name) / 'config.json'}"
    elif close:
        fault, hint = "which is neither", f"did you mean {close[0]}?"
    else:
        fault = "which is neither"
        hint = (
            "give one of these names, or the path of a checkpoint's config.json; its weights are not needed"
        )
    return BenchError(
        f"shape: expected one of {', '.join(known)}, or the path of a config.json, got {name}, {fault}",
        hint=hint,
    )
