"""What a measurement raises on purpose."""

from __future__ import annotations

from cpm_edge.runtimes.errors import CpmEdgeError


class BenchError(CpmEdgeError):
    """A measurement cannot be made or a peer failed."""

    default_hint = "See the subcommand's --help."
