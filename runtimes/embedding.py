"""The embedding table on the host: rows come from the mapped file, so only those in use are in memory."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from cpm_edge.runtimes.bundle import Bundle
from cpm_edge.runtimes.errors import BundleError

_FORMATS: dict[str, np.dtype[Any]] = {
    "float16": np.dtype("<f2"), "int8": np.dtype("i1"), "uint8": np.dtype("u1"),
}  # fmt: skip
_ZERO = 128  # the code of 0 in uint8


class HostEmbedding:
    """Rows (vocab_size, hidden_size): float16, or int8 or uint8 (128 is zero) with a float16 scale a row.

    Args:
        bundle: its manifest's ``engine.embedding`` has file, format, rows, columns, offset and, for integers,
            scales.offset; offsets are bytes in the file, values little-endian.

    Raises:
        BundleError: a format this version does not know, or a table that is not in the file.
    """

    def __init__(self, bundle: Bundle) -> None:
        entry = bundle.manifest.engine["embedding"]
        dtype = _FORMATS.get(entry["format"])
        if dtype is None:
            raise BundleError(
                f"engine.embedding.format: expected {' or '.join(_FORMATS)}, got {entry['format']!r}",
                hint="Upgrade with: pip install --upgrade cpm-edge",
            )
        shape = (bundle.manifest.vocab_size, bundle.manifest.hidden_size)
        if (entry["rows"], entry["columns"]) != shape:
            raise BundleError(f"engine.embedding: expected {shape}, got {entry['rows']} x {entry['columns']}")
        self._rows = _mapped(bundle, entry["file"], entry["offset"], shape, dtype)
        self._scales: npt.NDArray[np.float32] | None = None
        if dtype.itemsize == 1:
            scales = _mapped(bundle, entry["file"], entry["scales"]["offset"], shape[:1], _FORMATS["float16"])
            self._scales = scales.astype(np.float32)

    def gather(self, tokens: npt.NDArray[np.integer[Any]], out: npt.NDArray[np.float16]) -> None:
        """Write the rows of tokens (T,) into ``out`` (T, hidden_size)."""
        rows = self._rows[tokens]
        if self._scales is None:
            out[...] = rows
        else:
            codes = rows.astype(np.float32)
            if rows.dtype.kind == "u":
                codes -= _ZERO
            out[...] = codes * self._scales[tokens, None]


def _mapped(
    bundle: Bundle, name: str, offset: int, shape: tuple[int, ...], dtype: np.dtype[Any]
) -> npt.NDArray[Any]:
    try:
        return np.memmap(bundle.file(name), dtype, "r", offset, shape)
    except ValueError as error:
        raise BundleError(f"engine.embedding: {shape} at byte {offset} is not in {name}: {error}") from error
