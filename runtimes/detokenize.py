"""Text from a growing list of tokens: pieces that never have to be taken back.

The pieces add up to ``decode(all ids)`` exactly. Three things make text of the last tokens unstable:

- a byte-level token may end inside a UTF-8 character: the decoder then shows one U+FFFD at the end;
- a run of byte-fallback tokens (<0xE4> <0xBD> <0xA0>) is decoded as a whole, and one bad byte later turns all
  of it into U+FFFD, so a run is held back until it ends;
- SentencePiece decoders drop the space of the first token, so a token cannot be decoded by itself.
"""

from __future__ import annotations

import re

from tokenizers import Tokenizer

_BYTE_TOKEN = re.compile(r"<0x[0-9A-Fa-f]{2}>")
_WINDOW = 32
_CONTEXT = 4


class StreamDecoder:
    """Decodes one token at a time over a sliding window of the last tokens.

    Args:
        tokenizer: of the model.
        special: keep special tokens in the text.
    """

    def __init__(self, tokenizer: Tokenizer, *, special: bool = False) -> None:
        self._tokenizer = tokenizer
        self._special = special
        added = tokenizer.get_added_tokens_decoder()
        self._hidden = set() if special else {id_ for id_, token in added.items() if token.special}
        self._window: list[int] = []
        self._sent = 0  # characters of the decoded window that were handed out

    def push(self, token_id: int) -> str:
        """The text that became certain with this token, often but not always its own; may be empty."""
        piece = self._tokenizer.id_to_token(token_id)
        # Ids without a piece pad the model's vocabulary. The decoder never sees them or hidden tokens.
        if piece is None or token_id in self._hidden:
            return ""
        self._window.append(token_id)
        if _BYTE_TOKEN.fullmatch(piece):
            return ""
        text = self._decode(self._window)
        whole = not text.endswith("\ufffd")
        fresh = self._take(text if whole else text[:-1])
        if whole and len(self._window) >= _WINDOW:
            self._slide()
        return fresh

    def flush(self) -> str:
        """The rest, when no more tokens follow."""
        return self._take(self._decode(self._window))

    def _take(self, text: str) -> str:
        fresh = text[self._sent :]
        self._sent = max(self._sent, len(text))
        return fresh

    def _slide(self) -> None:
        # The kept tokens only give context, so they must decode to something: a context of no text would let
        # the decoder take the next token for the first of the text and drop its space.
        for keep in range(_CONTEXT, len(self._window)):
            context = self._window[-keep:]
            if text := self._decode(context):
                self._window, self._sent = context, len(text)
                return

    def _decode(self, ids: list[int]) -> str:
        return self._tokenizer.decode(ids, skip_special_tokens=not self._special)


class StopMatcher:
    """Ends a text before the first stop string, without ever showing the beginning of one.

    Which string counts does not depend on how the text is cut into pieces: the one that is complete first,
    and of several complete at the same character the longest.
    """

    def __init__(self, stops: tuple[str, ...]) -> None:
        self._stops = stops
        self._held = ""
        self.stopped = False

    def push(self, piece: str) -> str:
        """The part of all text so far that may be shown now and was not shown before."""
        if self.stopped:
            return ""
        text = self._held + piece
        found = [(at + len(stop), at) for stop in self._stops if (at := text.find(stop)) >= 0]
        if found:
            self.stopped, self._held = True, ""
            return text[: min(found)[1]]
        cut = len(text) - overlap(text, self._stops)
        self._held = text[cut:]
        return text[:cut]

    def flush(self) -> str:
        """What was held back, when no more text follows."""
        rest, self._held = self._held, ""
        return rest


def overlap(text: str, strings: tuple[str, ...]) -> int:
    """Characters at the end of ``text`` that may be the beginning of one of ``strings``."""
    longest = max((len(string) for string in strings), default=0) - 1
    for size in range(min(longest, len(text)), 0, -1):
        if any(string.startswith(text[-size:]) for string in strings):
            return size
    return 0
