"""What calibration made of the matrices of one layer, in memory and in a file."""

from __future__ import annotations

import json
import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import safetensors
from safetensors.numpy import save_file

from cpm_edge.quant import Quantized, Scheme, WeightFormat, pack_int4, pack_zeros_int4, unpack_int4
from cpm_edge.quant.formats import scheme_from_json

Floats = npt.NDArray[np.float32]


@dataclass
class LayerResult:
    """The integers of one layer, and the factors of what stays in floats.

    Attributes:
        integers: by tensor name.
        rows: factors of the rows (or elements) of a tensor by its name, (rows,): what AWQ moved into it.
        columns: factors of the columns of a matrix, (cols,).
        errors: squared output error of each matrix, relative to its squared output.
        unreached: matrices of experts that no calibration token chose: rounded to nearest.
        damping: the largest share of damping that a matrix needed.
    """

    integers: dict[str, Quantized] = field(default_factory=dict)
    rows: dict[str, Floats] = field(default_factory=dict)
    columns: dict[str, Floats] = field(default_factory=dict)
    errors: dict[str, float] = field(default_factory=dict)
    unreached: list[str] = field(default_factory=list)
    damping: float = 0.0

    def scaled(self, name: str, weight: Floats, start: int = 0) -> Floats:
        """Rows ``start``... of a float tensor with its factors."""
        if name in self.rows:
            factors = self.rows[name][start : start + len(weight)]
            weight = weight * (factors if weight.ndim == 1 else factors[:, None])
        return weight * self.columns[name] if name in self.columns else weight

    def save(self, path: Path) -> None:
        """Write the file as a whole; the same result gives the same bytes."""
        tensors: dict[str, npt.NDArray[Any]] = {}
        schemes = {}
        for name, matrix in self.integers.items():
            tensors[f"codes:{name}"] = pack_int4(matrix.codes)
            tensors[f"scales:{name}"] = matrix.scales
            if matrix.zeros is not None:
                tensors[f"zeros:{name}"] = pack_zeros_int4(matrix.zeros)
            schemes[name] = matrix.scheme.to_json()
        tensors |= {f"rows:{name}": factors for name, factors in self.rows.items()}
        tensors |= {f"columns:{name}": factors for name, factors in self.columns.items()}
        about = {
            "schemes": schemes,
            "errors": self.errors,
            "unreached": self.unreached,
            "damping": self.damping,
        }
        unfinished = path.with_suffix(".partial")
        save_file(tensors, unfinished, metadata={"about": json.dumps(about, sort_keys=True)})
        with unfinished.open("r+b") as file:
            os.fsync(file.fileno())
        unfinished.replace(path)


class LayerFile:
    """A saved ``LayerResult``, whose matrices are read one by one."""

    def __init__(self, path: Path) -> None:
        self.path = path
        with safetensors.safe_open(path, "np") as file:
            about = json.loads(file.metadata()["about"])
            keys = list(file.keys())
            self.factors = LayerResult(
                rows={k.partition(":")[2]: file.get_tensor(k) for k in keys if k.startswith("rows:")},
                columns={k.partition(":")[2]: file.get_tensor(k) for k in keys if k.startswith("columns:")},
                errors=about["errors"],
                unreached=about["unreached"],
                damping=about["damping"],
            )
        self.schemes: dict[str, Scheme] = {
            name: scheme_from_json(fields) for name, fields in about["schemes"].items()
        }

    def read(self, name: str) -> Quantized:
        """All rows of one matrix."""
        scheme = self.schemes[name]
        assert scheme.format is WeightFormat.INT4
        with safetensors.safe_open(self.path, "np") as file:
            packed, scales = file.get_tensor(f"codes:{name}"), file.get_tensor(f"scales:{name}")
            zeros = None
            if not scheme.symmetric:
                zeros = unpack_int4(file.get_tensor(f"zeros:{name}"), scales.shape[1])
        return Quantized(unpack_int4(packed, 2 * packed.shape[1]), scales, zeros, scheme)
