"""Failures of the export side; see cpm_edge.runtimes.errors for the whole tree."""

from __future__ import annotations

from cpm_edge.runtimes.errors import CpmEdgeError


class ExportError(CpmEdgeError):
    """An export cannot go on."""


class CheckpointError(ExportError):
    """The checkpoint's files are missing, damaged or of an unknown kind."""

    default_hint = "download or copy the checkpoint again; if that does not help, ask its author"


class ConfigError(ExportError):
    """A config value is missing, contradictory or not implemented.

    The message names the key: ``rope_scaling.rope_type: expected default or longrope, got yarn``.
    """

    default_hint = "config.json is damaged or of an unsupported model; see cpm-export --list-models"


class ExportWarning(UserWarning):
    """Something that the user should know and that does not stop an export."""
