"""Keys, values and states that stand in for a prompt: normal numbers of standard deviation 1.

What a step costs does not depend on them: selection takes a fixed number of blocks, which random keys spread
over the whole cache.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from cpm_edge.runtimes.cache_layout import RecurrentLayout

Halves = npt.NDArray[np.float16]
SHIFT = 977  # rows by which a layer's numbers are rotated against the layer before


class Synthetic:
    """Rows of every layer, from one draw.

    Args:
        rows: the longest context.
        recurrent: the layers with a state, if there are any.
    """

    def __init__(
        self,
        kv_heads: int,
        rows: int,
        head_size: int,
        seed: int = 0,
        *,
        recurrent: RecurrentLayout | None = None,
    ) -> None:
        self._recurrent = recurrent
        rng = np.random.default_rng(seed)
        shape = (kv_heads, rows, head_size)
        self._keys: Halves = rng.standard_normal(shape, np.float32).astype(np.float16)
        self._values: Halves = rng.standard_normal(shape, np.float32).astype(np.float16)

    def state(self, layer: int) -> npt.NDArray[np.float32]:
        """State (heads, D, D) of a recurrent layer, after any number of tokens.

        Raises:
            ValueError: the model was said to have none.
        """
        if self._recurrent is None:
            raise ValueError("this model has no recurrent layers")
        return np.random.default_rng(layer).standard_normal(self._recurrent.shape[1:], np.float32)

    def rows(self, layer: int, first: int, stop: int) -> tuple[Halves, Halves]:
        """Keys and values (kv heads, stop - first, head_dim) of a layer's positions from ``first`` on."""
        places = (np.arange(first, stop) + layer * SHIFT) % self._keys.shape[1]
        return self._keys[:, places], self._values[:, places]
