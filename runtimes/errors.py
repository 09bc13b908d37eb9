"""Every exception the toolkit raises on purpose.

CpmEdgeError
├── BundleError        a bundle is damaged, unsafe, too new, or made for another chip
├── BackendError       an engine is missing, too old, or cannot run on this device
├── PromptError        a prompt is empty, malformed, or cannot be rendered
├── OptionError        a generation option is out of range; also a ValueError
├── ContextError       tokens do not fit the context the bundle was exported for
└── ExportError        (cpm_edge.exporter.errors) the checkpoint, its config or the disk

Only the command lines catch these; they print ``error:`` and ``hint:`` and exit with 1.
"""

from __future__ import annotations

from typing import ClassVar


class CpmEdgeError(Exception):
    """Base of all deliberate failures.

    Args:
        message: what went wrong, what was expected and what was found.
        hint: the next step for the user; the class's default where there is nothing more exact to say.
    """

    default_hint: ClassVar[str | None] = None

    def __init__(self, message: str, *, hint: str | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint or self.default_hint


class BundleError(CpmEdgeError):
    """The bundle folder cannot be used."""

    default_hint = "Copy the bundle again, or export it again."


class BackendError(CpmEdgeError):
    """The inference engine or the device cannot be used."""

    default_hint = "Check the engine's version and the bundle with: cpm-run BUNDLE --check"


class PromptError(CpmEdgeError):
    """The prompt or the conversation cannot be turned into tokens."""


class OptionError(CpmEdgeError, ValueError):
    """A generation option has a value that means nothing."""

    default_hint = "See cpm-run --help for the options and their ranges."


class ContextError(CpmEdgeError):
    """More tokens than the context holds."""

    default_hint = "Use fewer tokens, or export again with a larger --max-context."


def missing_dependency(module: str, extra: str) -> BackendError:
    """The one error for an optional package that is not installed."""
    return BackendError(
        f"the Python package {module!r} is needed here and is not installed",
        hint=f'pip install "cpm-edge[{extra}]"',
    )
