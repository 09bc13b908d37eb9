"""The embedding on the host: a table that the runtime maps and looks rows up in."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from cpm_edge.exporter.passes.engine_weights import EngineWeights
from cpm_edge.exporter.weight_file import Region, WeightFile
from cpm_edge.exporter.weights import EMBEDDING, ModelWeights
from cpm_edge.quant import Scheme, WeightFormat, openvino_i8

FILE = "embedding.bin"


def stays_in_engine(scheme: Scheme, tied: bool) -> bool:
    """Whether embedding and head are one float16 tensor, so that a lookup in the engine costs nothing."""
    return tied and scheme.format is WeightFormat.FP16


def write_table(weights: ModelWeights, folder: Path) -> dict[str, Any]:
    """Write ``embedding.bin``; the manifest's description of it.

    Raises:
        ExportError: a disk error.
    """
    scales: list[npt.NDArray[np.float16]] = []

    def codes() -> Any:
        for quantized in weights.quantized(EMBEDDING):
            scales.append(quantized.scales.astype(np.float16))
            yield openvino_i8(quantized)

    with WeightFile(folder / FILE) as file:
        if weights.scheme(EMBEDDING).format is WeightFormat.FP16:
            region = file.add(weights.stored(EMBEDDING))
            weights.count_bytes(EMBEDDING, region)
            return _described(weights, FILE, region, None)
        region = file.add(codes())
        scale_region = file.add(scales)
        weights.count_bytes(EMBEDDING, region)
        weights.count_bytes(EMBEDDING, scale_region)
    return _described(weights, FILE, region, scale_region)


def shared_table(engine: EngineWeights) -> dict[str, Any]:
    """The table that is the head's 8-bit codes in the engine's own data file."""
    codes, scales = engine.regions[EMBEDDING]
    described = _described(engine.weights, engine.file.path.name, codes, scales)
    return described | {"format": engine.byte_format}


def _described(weights: ModelWeights, file: str, codes: Region, scales: Region | None) -> dict[str, Any]:
    rows, columns = weights.shapes[EMBEDDING]
    return {
        "file": file,
        "format": "float16" if scales is None else "int8",
        "rows": rows,
        "columns": columns,
        "offset": codes.offset,
        "scales": None if scales is None else {"offset": scales.offset, "dtype": "float16"},
    }
