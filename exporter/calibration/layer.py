"""One decoder layer: scales found, moved and its matrices turned into integers."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from cpm_edge.exporter.calibration.matrices import LayerResult
from cpm_edge.exporter.calibration.settings import Settings
from cpm_edge.exporter.calibration.sites import Channels, Part, Site
from cpm_edge.exporter.errors import CheckpointError
from cpm_edge.quant import QuantError, Quantized, Scheme, quantize
from cpm_edge.quant.awq import Reader, search_scales
from cpm_edge.quant.gptq import gptq
from cpm_edge.quant.grid_search import search_grid
from cpm_edge.quant.hessian import Hessian, output_power, rescale

Floats = npt.NDArray[np.float32]
SAMPLED_ROWS = 256  # of each matrix, for the squared output that errors are relative to


class LayerCalibration:
    """Works on the weights of one layer in memory, a torch module, and changes them in place.

    Args:
        layer: the module with the checkpoint's weights.
        prefix: of its tensor names, ``model.layers.3.``.
        settings: of the calibration.
        scheme_of: the int4 scheme of a tensor.
        progress: called with the number of weights done.
    """

    def __init__(
        self,
        layer: Any,
        prefix: str,
        settings: Settings,
        scheme_of: Callable[[str], Scheme],
        progress: Callable[[int], None],
    ) -> None:
        self._layer = layer
        self._prefix = prefix
        self._settings = settings
        self._scheme_of = scheme_of
        self._progress = progress
        self.result = LayerResult()

    def run(self, sites: tuple[Site, ...], moments: Mapping[str, Hessian]) -> LayerResult:
        """Quantize all matrices of the sites; the module then has the weights of the integers.

        Args:
            moments: of all parts, by their keys; they are overwritten.

        Raises:
            CheckpointError: a matrix that cannot be quantized, by name.
        """
        matrices = {key: moment.finish() for key, moment in moments.items()}
        reached = {key for key, moment in moments.items() if moment.rows}
        if self._settings.smooths:
            for site in sites:
                self._smooth(site, matrices, reached)
        for part in (part for site in sites for part in site.parts):
            self._quantize(part, matrices[part.key] if part.key in reached else None)
        return self.result

    def _smooth(self, site: Site, matrices: dict[str, Floats], reached: set[str]) -> None:
        """Move the best scales of a site into its producer."""
        readers = [
            Reader(self._weight(name), matrices[part.key])
            for part in site.parts
            if part.key in reached
            for name in part.readers
        ]
        if not readers:
            return
        channels = _channels(site, readers[0].weight.shape[1])
        scheme = self._scheme_of(f"{self._prefix}{site.parts[0].readers[0]}.weight")
        with _naming(self._prefix + site.parts[0].readers[0]):
            factors = search_scales(readers, channels, lambda weight: quantize(weight, scheme))
        if factors is None:
            return
        self._scale(site.producer, rows=_placed(np.float32(1) / factors, len(self._parameter(site.producer))))
        for name in (*(n for part in site.parts for n in part.readers), *site.others):
            self._scale(f"{name}.weight", columns=factors[channels])
        for part in site.parts:
            rescale(matrices[part.key], np.float32(1) / factors[channels])

    def _scale(self, name: str, *, rows: Floats | None = None, columns: Floats | None = None) -> None:
        """Note factors of a tensor, and multiply it."""
        full = self._prefix + name
        for factors, kept in ((rows, self.result.rows), (columns, self.result.columns)):
            if factors is not None:
                kept[full] = kept[full] * factors if full in kept else factors
        change = LayerResult(
            rows={} if rows is None else {name: rows}, columns={} if columns is None else {name: columns}
        )
        tensor = self._parameter(name)
        tensor.data = torch.from_numpy(change.scaled(name, tensor.detach().numpy()))

    def _quantize(self, part: Part, moment: Floats | None) -> None:
        """The readers of a part together: they share all that is computed from the moment."""
        weights = [self._weight(name) for name in part.readers]
        scheme = self._scheme_of(f"{self._prefix}{part.readers[0]}.weight")
        with _naming(self._prefix + part.readers[0]):
            if moment is None:
                for name, weight in zip(part.readers, weights, strict=True):
                    self.result.unreached.append(f"{self._prefix}{name}.weight")
                    self._store(name, quantize(weight, scheme), 0.0)
                return
            power = [float(output_power(_sample(w), moment).mean()) * len(w) for w in weights]
            stacked = weights[0] if len(weights) == 1 else np.concatenate(weights)
            matrix, cost = self._rounded(stacked, moment, scheme)
        start = 0
        for name, weight, whole in zip(part.readers, weights, power, strict=True):
            rows = slice(start, start + len(weight))
            start += len(weight)
            zeros = None if matrix.zeros is None else matrix.zeros[rows]
            own = Quantized(matrix.codes[rows], matrix.scales[rows], zeros, scheme)
            self._store(name, own, float(cost[rows].sum()) / whole if whole else 0.0)

    def _rounded(
        self, weight: Floats, moment: Floats, scheme: Scheme
    ) -> tuple[Quantized, npt.NDArray[np.float64]]:
        """The integers of a matrix, and the squared output error of each row."""
        settings = self._settings
        if not settings.feeds_back and not settings.smooths:
            matrix = quantize(weight, scheme)
            return matrix, output_power(weight - matrix.dequantize(), moment)
        assert scheme.group_size is not None
        matrix = search_grid(weight, moment, scheme.group_size, scheme.symmetric)
        if settings.feeds_back:
            result = gptq(weight, moment, matrix, act_order=settings.act_order, damping=settings.damping)
            self.result.damping = max(self.result.damping, result.damping)
            return result.matrix, result.cost
        return matrix, output_power(weight - matrix.dequantize(), moment)

    def _store(self, name: str, matrix: Quantized, error: float) -> None:
        full = f"{self._prefix}{name}.weight"
        self.result.integers[full] = matrix
        self.result.errors[full] = error
        self._parameter(f"{name}.weight").data = torch.from_numpy(matrix.dequantize())
        self._progress(matrix.codes.size)

    def _weight(self, reader: str) -> Floats:
        weight: Floats = self._parameter(f"{reader}.weight").detach().numpy()
        return weight

    def _parameter(self, name: str) -> Any:
        return self._layer.get_parameter(name)


def _channels(site: Site, cols: int) -> Channels:
    return site.channels if len(site.channels) else np.arange(cols)


def _placed(factors: Floats, rows: int) -> Floats:
    """Factors of all rows of a producer; those behind the last channel are left alone."""
    result = np.ones(rows, np.float32)
    result[: len(factors)] = factors
    return result


def _sample(weight: Floats) -> Floats:
    return weight[:: -(-len(weight) // SAMPLED_ROWS)]


@contextmanager
def _naming(module: str) -> Iterator[None]:
    """Put the tensor's name into a QuantError."""
    try:
        yield
    except QuantError as error:
        raise CheckpointError(f"tensor {module}.weight: {error.message}", hint=error.hint) from error
