"""The tensors of Marlin checkpoints, symmetric int4: where each integer lies.

    B, or qweight  int32 (cols / 16, 2 rows)   codes in tiles of 16 columns by 64 rows
    s, or scales   (groups, rows)              with rows permuted within 64, or 32 when there is one group

weight = (code - 8) * scale. A tile is 128 words: those that one warp of an Ampere tensor core loads, 32
lanes with 4 words each. Word (lane, j) covers rows 16 j .. 16 j + 15: of the columns 2 (lane mod 4) +
{0, 1, 8, 9} it holds the rows lane / 4 and lane / 4 + 8, in the nibble order of ORDER.

Source: https://github.com/IST-DASLab/marlin, which AutoGPTQ and AutoAWQ write with their names.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from cpm_edge.quant.errors import QuantError
from cpm_edge.quant.int4 import Bytes
from cpm_edge.quant.packed import Words, nibbles

TILE_COLS, TILE_ROWS = 16, 64
ORDER = (0, 2, 4, 6, 1, 3, 5, 7)


def _tile_places() -> npt.NDArray[np.int64]:
    """For each nibble of a tile's 128 words its place in the tile, 64 * column + row."""
    lane = np.arange(32)[:, None, None]
    sixteen = np.arange(4)[None, :, None]
    place = np.array(ORDER)[None, None, :]
    column = 2 * (lane % 4) + np.array([0, 1, 8, 9])[place % 4]
    row = 16 * sixteen + lane // 4 + 8 * (place // 4)
    places: npt.NDArray[np.int64] = (column * TILE_ROWS + row).reshape(-1)
    return places


def _scale_places(count: int) -> npt.NDArray[np.int64]:
    """For each stored scale of 64 (grouped) or 32 (one group) rows, the row it belongs to."""
    if count > 1:
        return np.arange(64).reshape(8, 8).T.reshape(-1)
    places: npt.NDArray[np.int64] = 2 * np.arange(4)[:, None] + np.array([0, 1, 8, 9, 16, 17, 24, 25])
    return places.reshape(-1)


def unpack_marlin(words: Words) -> Bytes:
    """Codes uint8 (rows, cols) of int32 (cols / 16, 2 rows), or of whole tiles of its columns.

    Raises:
        QuantError: not int32 with two axes, or rows that are no multiple of 64.
    """
    tiles = nibbles(words)
    if tiles.shape[1] % (TILE_COLS * TILE_ROWS):
        raise QuantError(f"Marlin: expected a multiple of {TILE_ROWS} rows, got {words.shape[1] // 2}")
    tiles = tiles.reshape(len(words), -1, TILE_COLS * TILE_ROWS)
    codes = tiles[:, :, np.argsort(_tile_places())]  # (cols / 16, rows / 64, 16, 64)
    codes = codes.reshape(len(words), -1, TILE_COLS, TILE_ROWS).transpose(1, 3, 0, 2)
    return np.ascontiguousarray(codes.reshape(-1, len(words) * TILE_COLS))


def unpermute_marlin_scales(scales: npt.NDArray[np.generic]) -> npt.NDArray[np.generic]:
    """Scales (groups, rows) in the order of the rows.

    Raises:
        QuantError: rows that the permutation does not divide.
    """
    groups, rows = scales.shape
    places = _scale_places(groups)
    if rows % len(places):
        raise QuantError(f"Marlin: expected a multiple of {len(places)} rows, got {rows}")
    return scales.reshape(groups, -1, len(places))[:, :, np.argsort(places)].reshape(groups, rows)
