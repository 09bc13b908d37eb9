"""Failures of the export side; see cpm_edge.runtimes.errors for the whole tree."""

from __future__ import annotations

from cpm_edge.runtimes.errors import CpmEdgeError


class ExportError(CpmEdgeError):
    """An export cannot go on."""


class CheckpointError(ExportError):
    """The checkpoint's files are missing, damaged or of an unknown kind."""


class ConfigError(ExportError):
    """A config value is missing, contradictory or not implemented.

    The message names the key: ``rope_scaling.rope_type: expected default or longrope, got yarn``.
    """
