"""Copies of recurrent states, so that a sequence can go back: a state, unlike a cache, has no rows to drop.

A few are kept, of bounded size. They lie the denser the closer to the end of the sequence, where going back
is usual and should be cheap; going back further computes more tokens again.
"""

from __future__ import annotations

from math import log

import numpy as np
from numpy.typing import NDArray

States = list[NDArray[np.float32]]

BUDGET = 256 << 20  # bytes a session
MOST = 16
INTERVAL = 512  # tokens after which another one is due


class Snapshots:
    """The states of all recurrent layers at some positions of one sequence.

    Args:
        state_bytes: of one snapshot.
    """

    def __init__(self, state_bytes: int) -> None:
        self.state_bytes = state_bytes
        self.limit = max(1, min(MOST, BUDGET // state_bytes))
        self._kept: dict[int, States] = {}  # by position, ascending

    @property
    def positions(self) -> list[int]:
        """Where they are, ascending. The empty sequence needs none."""
        return list(self._kept)

    @property
    def nbytes(self) -> int:
        """Bytes of all of them; forks of a session share them."""
        return len(self._kept) * self.state_bytes

    @property
    def newest(self) -> int:
        return next(reversed(self._kept), 0)

    def add(self, position: int, states: States) -> None:
        """Keep states, which must not change any more; at most ``limit`` of them stay.

        Args:
            position: at least that of the newest.
        """
        self._kept[position] = states
        if len(self._kept) > self.limit:
            del self._kept[self._least_useful(position)]

    def forget_after(self, position: int) -> None:
        """Drop those of tokens that are no longer part of the sequence."""
        for later in [p for p in self._kept if p > position]:
            del self._kept[later]

    def at_most(self, position: int) -> tuple[int, States | None]:
        """The nearest position not after this one, and its states; 0 and None for the beginning."""
        nearest = max((p for p in self._kept if p <= position), default=0)
        return nearest, self._kept.get(nearest)

    def copy(self) -> Snapshots:
        """Another set with the same states."""
        twin = Snapshots(self.state_bytes)
        twin.limit, twin._kept = self.limit, dict(self._kept)
        return twin

    def _least_useful(self, end: int) -> int:
        """The one whose loss costs least, never the newest.

        Without it, going back to somewhere between it and the next one means to compute as many tokens more
        as lie before it; how often that happens is taken to fall with the distance from the end.
        """
        positions = [0, *self._kept]

        def cost(index: int) -> float:
            before, here, after = positions[index - 1 : index + 2]
            return (here - before) * log((end - here + 1) / (end - after + 1))

        return positions[min(range(1, len(positions) - 1), key=cost, default=1)]
