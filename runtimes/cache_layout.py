"""What the manifest's ``cache`` says about layers: rows of which kind, or a state."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from cpm_edge.runtimes.snapshots import Snapshots

STATE = "recurrent_state"


@dataclass(frozen=True)
class RecurrentLayout:
    """The layers that have a float32 state (1, heads, key_size, value_size) instead of a cache.

    Attributes:
        layers: their numbers, ascending.
    """

    layers: tuple[int, ...]
    heads: int
    key_size: int
    value_size: int

    @classmethod
    def of(cls, cache: dict[str, Any]) -> RecurrentLayout | None:
        """None when every layer has a cache."""
        found = cache.get("recurrent")
        if not found:
            return None
        return cls(tuple(found["layers"]), found["heads"], found["key_size"], found["value_size"])

    @property
    def shape(self) -> tuple[int, int, int, int]:
        return 1, self.heads, self.key_size, self.value_size

    @property
    def nbytes(self) -> int:
        """Of all layers together."""
        return 4 * len(self.layers) * math.prod(self.shape)


def recurrent_info(cache: dict[str, Any]) -> dict[str, Any]:
    """What an engine's ``info`` says of states and their snapshots; nothing when every layer has a cache."""
    recurrent = RecurrentLayout.of(cache)
    if recurrent is None:
        return {}
    limit = Snapshots(recurrent.nbytes).limit
    return {"state_bytes": recurrent.nbytes, "snapshot_bytes_limit": limit * recurrent.nbytes}


def kv_layers(cache: dict[str, Any]) -> list[int]:
    """The layers that cache keys and values."""
    recurrent = RecurrentLayout.of(cache)
    without = recurrent.layers if recurrent else ()
    return [layer for layer in range(cache["layers"]) if layer not in without]


def kv_ports(cache: dict[str, Any]) -> list[str]:
    """The names of such a layer's caches: keys and values, or keys of which the values are columns."""
    return list(cache.get("ports", ("key", "value")))
