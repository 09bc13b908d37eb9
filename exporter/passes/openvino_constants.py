"""Placeholder parameters of a serialized IR become constants, their data appended to the .bin file.

In the IR, a constant is a layer with an element type, a shape and a place in the .bin file. Writing it there
directly keeps a model of any size out of memory.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from xml.etree import ElementTree

from cpm_edge.exporter.errors import ExportError
from cpm_edge.exporter.passes.openvino_weights import OpenVinoWeights
from cpm_edge.exporter.weight_file import Region, WeightFile


def attach_constants(
    xml: Path, data: Path, weights: OpenVinoWeights, progress: Callable[[int], None]
) -> None:
    """Write every placeholder's data behind ``data`` and point the layers of ``xml`` at it.

    Raises:
        ExportError: a placeholder got lost on the way, or a disk error.
    """
    regions: dict[str, Region] = {}
    with WeightFile(data, append=True) as file:
        for name in weights.weights.names():
            for placeholder, blocks in weights.data(name):
                regions[placeholder] = file.add(blocks)
                weights.weights.count_bytes(name, regions[placeholder])
            progress(weights.weights.elements(name))
    missing = weights.placeholders.symmetric_difference(regions)
    if missing:
        raise ExportError(f"internal: weights without a place in the IR: {', '.join(sorted(missing)[:5])}")
    tree = ElementTree.parse(xml)
    layers = tree.getroot().find("layers")
    assert layers is not None
    for layer in layers:
        region = regions.pop(layer.get("name", ""), None)
        if region is not None:
            _to_constant(layer, region)
    if regions:
        raise ExportError(f"internal: weights not in the IR: {', '.join(sorted(regions)[:5])}")
    tree.write(xml, encoding="utf-8", xml_declaration=True)


def _to_constant(layer: ElementTree.Element, region: Region) -> None:
    attributes = layer.find("data")
    assert layer.get("type") == "Parameter" and attributes is not None
    layer.set("type", "Const")
    shape = attributes.get("shape", "")
    element_type = attributes.get("element_type", "")
    attributes.attrib.clear()
    attributes.attrib.update(
        element_type=element_type,
        shape=shape,
        offset=str(region.offset),
        size=str(region.length),
    )
