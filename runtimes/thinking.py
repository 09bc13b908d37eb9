"""What a model thought, apart from what it answered, also while both are streaming.

Models that can think write ``<think>``, the thought, ``</think>`` and then the answer; or their chat template
ends the prompt with ``<think>``, and they go on from there. A thought can only come first: the same tags
later in an answer are text. A thought that is never closed takes up everything.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, TypeAlias

from cpm_edge.runtimes.detokenize import overlap

OPEN, CLOSE = "<think>", "</think>"

Kind: TypeAlias = Literal["thought", "answer"]


@dataclass(frozen=True)
class Event:
    """A piece of a stream and which part of it this is; the tags and the space around them are in none."""

    kind: Kind
    text: str


class ThoughtSplitter:
    """Tells the thought from the answer, however the text is cut into pieces.

    Args:
        in_thought: the prompt ends inside a thought; see ``opens_thought``.
    """

    def __init__(self, *, in_thought: bool = False) -> None:
        self._state: Literal["start", "thought", "between", "answer"] = "thought" if in_thought else "start"
        self._held = ""
        self._shown = False  # of the thought

    def push(self, piece: str) -> list[Event]:
        """What is certain with this piece: at most the end of a thought and the beginning of the answer."""
        self._held += piece
        events = []
        if self._state == "start":
            self._look_for_open()
        if self._state == "thought" and (text := self._thought()):
            events.append(Event("thought", text))
        if self._state == "between" and (rest := self._held.lstrip()):
            self._state, self._held = "answer", rest
        if self._state == "answer" and self._held:
            events.append(Event("answer", self._held))
            self._held = ""
        return events

    def flush(self) -> list[Event]:
        """What was held back, when no more text follows."""
        rest, self._held = self._held, ""
        if self._state in ("thought", "between"):
            rest = rest.strip() if not self._shown else rest.rstrip()
        kind: Kind = "thought" if self._state == "thought" else "answer"
        return [Event(kind, rest)] if rest else []

    def _look_for_open(self) -> None:
        text = self._held.lstrip()
        if text.startswith(OPEN):
            self._state, self._held = "thought", text[len(OPEN) :]
        elif not OPEN.startswith(text):
            self._state = "answer"

    def _thought(self) -> str:
        """The part of the thought that may be shown now, without the space at its ends."""
        if not self._shown:
            self._held = self._held.lstrip()
        text, closed, rest = self._held.partition(CLOSE)
        if closed:
            self._state, self._held = "between", rest
            self._shown, text = True, text.rstrip()
            return text
        text = text[: len(text) - overlap(text, (CLOSE,))].rstrip()
        self._held = self._held[len(text) :]
        self._shown = self._shown or bool(text)
        return text


def opens_thought(prompt: str) -> bool:
    """Whether a model that continues this prompt begins inside a thought."""
    return prompt.rstrip().endswith(OPEN)


def split_thought(text: str, *, in_thought: bool = False) -> tuple[str, str]:
    """The thought and the answer of a whole text; either may be empty."""
    splitter = ThoughtSplitter(in_thought=in_thought)
    events = [*splitter.push(text), *splitter.flush()]
    thought, answer = ("".join(e.text for e in events if e.kind == kind) for kind in ("thought", "answer"))
    return thought, answer
