"""What bundles hold, byte by byte: the engines' own accessors would convert it."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple
from xml.etree import ElementTree

import numpy as np
import numpy.typing as npt

Bytes = npt.NDArray[np.uint8]


def nibbles(packed: Bytes) -> Bytes:
    """Two codes a byte, the first in the lower half: (n, m) to (n, 2 m)."""
    return np.stack([packed & np.uint8(15), packed >> np.uint8(4)], axis=-1).reshape(len(packed), -1)


def constants(path: Path) -> dict[str, tuple[str, list[int], Bytes]]:
    """Element type, shape and bytes of every constant of an IR."""
    found = {}
    for layer in ElementTree.parse(path).iter("layer"):
        data = layer.find("data")
        if layer.get("type") == "Const" and data is not None:
            start, size = int(data.get("offset", "")), int(data.get("size", ""))
            raw = np.fromfile(path.with_suffix(".bin"), np.uint8, size, offset=start)
            shape = [int(size) for size in data.get("shape", "").split(",") if size]
            found[layer.get("name", "")] = (data.get("element_type", ""), shape, raw)
    return found


class PanelFormat(NamedTuple):
    """Attributes of the op that reads a panel constant."""

    bits: int
    group: int
    symmetric: bool


def panel_formats(path: Path) -> dict[str, PanelFormat]:
    """By the name of the panel constant."""
    root = ElementTree.parse(path).getroot()
    layers = {layer.get("id"): layer for layer in root.iter("layer")}
    found = {}
    for edge in root.iter("edge"):
        name = layers[edge.get("from-layer")].get("name", "")
        data = layers[edge.get("to-layer")].find("data")
        if name.endswith(".panels") and data is not None:
            bits, group, symmetric = (int(data.get(key, "")) for key in ("bits", "group", "symmetric"))
            found[name] = PanelFormat(bits, group, bool(symmetric))
    return found
