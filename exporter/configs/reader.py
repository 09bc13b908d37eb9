"""Typed reading of config.json: a value that the code does not implement is refused, never ignored."""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterable, Mapping
from typing import Any, TypeVar

from cpm_edge.exporter.errors import ConfigError, ExportWarning

T = TypeVar("T")

REQUIRED: Any = object()
LARGEST = 2**31 - 1  # sizes and lengths fit the engines' 32-bit shapes
_NAMES = {int: "an integer", float: "a number", str: "a string", bool: "true or false", dict: "an object",
          list: "an array"}  # fmt: skip

# Keys that say how a model was trained, saved or generated with, not what it computes.
IGNORED = frozenset(
    {
        "architectures",
        "auto_map",
        "_name_or_path",
        "model_type",
        "torch_dtype",
        "dtype",
        "transformers_version",
        "use_cache",
        "bos_token_id",
        "eos_token_id",
        "pad_token_id",
        "initializer_range",
        "attention_dropout",
        "mup_denominator",
        "max_length",
        "_attn_implementation",
        "attn_implementation",
        "output_attentions",
        "output_hidden_states",
        "return_dict",
        "is_llama_config",
        "pretraining_tp",
    }
)


class ConfigReader:
    """Reads one JSON object of a config and remembers which keys were used.

    Args:
        data: the object.
        path: its key in the config, for messages; empty for the top level.
    """

    def __init__(self, data: Mapping[str, Any], path: str = "") -> None:
        if not isinstance(data, Mapping):
            raise ConfigError(f"{path or 'config.json'}: expected an object, got {data!r}")
        self._data = data
        self._path = path
        self._used: set[str] = set()

    def name(self, key: str) -> str:
        return f"{self._path}.{key}" if self._path else key

    def has(self, key: str) -> bool:
        """Whether the key is there, with a value other than null."""
        return self._data.get(key) is not None

    def get(self, key: str, kind: type[T], default: Any = REQUIRED) -> T:
        """The value of ``key``; null counts as absent when there is a default.

        Raises:
            ConfigError: the key is missing or of another type.
        """
        self._used.add(key)
        value = self._data.get(key)
        if value is None:
            if default is REQUIRED:
                raise ConfigError(f"{self.name(key)}: expected {_NAMES[kind]}, got nothing")
            return default  # type: ignore[no-any-return]
        if kind is float and type(value) is int:
            value = float(value)
        if type(value) is not kind or (kind is float and not math.isfinite(value)):  # type: ignore[arg-type]
            raise ConfigError(f"{self.name(key)}: expected {_NAMES[kind]}, got {value!r}")
        return value

    def positive(self, key: str, default: Any = REQUIRED) -> int:
        value = self.get(key, int, default)
        if value <= 0:
            raise ConfigError(f"{self.name(key)}: expected a positive integer, got {value}")
        if value > LARGEST:
            raise ConfigError(f"{self.name(key)}: expected at most {LARGEST}, got {value}")
        return value

    def positive_number(self, key: str, default: Any = REQUIRED) -> float:
        value = self.get(key, float, default)
        if value <= 0:
            raise ConfigError(f"{self.name(key)}: expected a positive number, got {value}")
        return value

    def only(self, key: str, allowed: Iterable[Any], default: Any = REQUIRED) -> Any:
        """The value of ``key``, refused unless the code implements it."""
        self._used.add(key)
        value = self._data.get(key)
        if value is None and default is not REQUIRED:
            value = default
        allowed = tuple(allowed)
        # 0 == False in Python, but 0 and false are not the same setting.
        if not any(value == a and type(value) is type(a) for a in allowed):
            expected = " or ".join(_json(a) for a in allowed)
            raise ConfigError(
                f"{self.name(key)}: expected {expected}, got {_json(value)}",
                hint="the model needs something that is not implemented; see cpm-export --list-models",
            )
        return value

    def numbers(self, key: str, count: int) -> tuple[float, ...]:
        """A list of ``count`` positive numbers."""
        self._used.add(key)
        value = self._data.get(key)
        if not isinstance(value, list) or not all(
            type(v) in (int, float) and 0 < v < math.inf for v in value
        ):
            raise ConfigError(f"{self.name(key)}: expected {count} positive numbers, got {_shorten(value)}")
        if len(value) != count:
            raise ConfigError(f"{self.name(key)}: expected {count} numbers, got {len(value)}")
        return tuple(float(v) for v in value)

    def token_ids(self, key: str) -> list[int]:
        """One id or a list of them, [] when absent or negative."""
        self._used.add(key)
        value = self._data.get(key)
        ids = value if isinstance(value, list) else [] if value is None else [value]
        if not all(type(token) is int for token in ids):
            raise ConfigError(
                f"{self.name(key)}: expected token ids, got {_shorten(value)}",
                hint="correct it in generation_config.json or config.json",
            )
        return [token for token in ids if token >= 0]

    def section(self, key: str) -> ConfigReader | None:
        """A nested object, or None when it is absent or null."""
        self._used.add(key)
        value = self._data.get(key)
        return None if value is None else ConfigReader(value, self.name(key))

    def skip(self, *keys: str) -> None:
        self._used.update(keys)

    def finish(self, *, strict: bool) -> None:
        """Refuse (strict) or warn about keys that nobody read."""
        unknown = sorted(set(self._data) - self._used - (frozenset() if strict else IGNORED))
        if not unknown:
            return
        if strict:
            raise ConfigError(
                f"{self._path}: unknown keys {', '.join(unknown)}; they may change what the model computes"
            )
        message = f"config.json: keys without effect here: {', '.join(unknown)}"
        warnings.warn(message, ExportWarning, stacklevel=3)


def _json(value: Any) -> str:
    return (
        {True: "true", False: "false", None: "nothing"}.get(value, str(value))
        if _plain(value)
        else str(value)
    )


def _plain(value: Any) -> bool:
    return value is None or isinstance(value, bool)


def _shorten(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."
