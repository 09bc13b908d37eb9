"""Pooled keys of rows that did not pass through the op: of a filled cache."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt


def pool_keys(
    keys: npt.NDArray[np.floating[Any]],
    pooled: npt.NDArray[np.float32],
    kernel: int,
    first: int,
    stop: int,
) -> None:
    """Write the pooled keys of the windows that rows [first, stop) complete.

    Args:
        keys: (kv heads, capacity, head_dim), as they are stored, valid up to ``stop``.
        pooled: (kv heads, capacity / stride, head_dim); row j is the mean of ``kernel`` = 2 * stride keys
            from stride * j on.
    """
    stride = kernel // 2
    begin, end = (max(0, (rows - kernel) // stride + 1) for rows in (first, stop))
    if end > begin:
        rows = keys[:, stride * begin : stride * (end + 1)].astype(np.float32)
        halves = rows.reshape(len(keys), end + 1 - begin, stride, -1).sum(2)
        pooled[:, begin:end] = (halves[:, :-1] + halves[:, 1:]) / kernel
