"""The tokenizer of a bundle: BOS exactly once, every end-of-sequence id, no hidden truncation."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import tokenizers

from cpm_edge.runtimes.bundle import Bundle
from cpm_edge.runtimes.errors import BundleError, PromptError

SPECIAL_NAMES = ("bos_token", "eos_token", "unk_token", "pad_token", "sep_token", "cls_token", "mask_token")


class Tokenizer:
    """Encodes prompts and decodes answers.

    Args:
        backend: the tokenizers library's object; truncation and padding saved in it are switched off.
        config: tokenizer_config.json.
        eos_token_ids: ids named by generation_config.json and config.json.
    """

    def __init__(
        self, backend: tokenizers.Tokenizer, config: Mapping[str, Any], eos_token_ids: Sequence[int] = ()
    ) -> None:
        backend.no_truncation()
        backend.no_padding()
        self.backend = backend
        self.special_tokens = _special_tokens(config)
        bos = self.special_tokens.get("bos_token")
        self.bos_id = None if bos is None else backend.token_to_id(bos)
        self.adds_bos = self.bos_id is not None and self._wants_bos(config)
        self.eos_ids = frozenset(eos_token_ids) or self._declared_eos()

    @classmethod
    def from_bundle(cls, bundle: Bundle) -> Tokenizer:
        """Read tokenizer.json and what belongs to it.

        Raises:
            BundleError: no tokenizer.json, or one that the tokenizers library cannot read.
        """
        path = bundle.file("tokenizer.json")
        try:
            backend = tokenizers.Tokenizer.from_file(str(path))
        except Exception as error:  # the library raises nothing narrower
            raise BundleError(
                f"tokenizer.json: tokenizers {tokenizers.__version__} cannot read it: {error}",
                hint="Upgrade with: pip install --upgrade tokenizers",
            ) from error
        eos = [
            id_
            for name in ("generation_config.json", "config.json")
            for id_ in _ids(bundle.read_json(name).get("eos_token_id"), f"{name}: eos_token_id")
        ]
        return cls(backend, bundle.read_json("tokenizer_config.json"), eos)

    def encode(self, text: str) -> list[int]:
        """Token ids of a prompt. BOS comes first if the model wants it, unless the text brings its own.

        Special tokens written out in the text become their ids. Nothing is appended.

        Raises:
            PromptError: the text holds lone surrogates, which is how Python reads bytes that are not UTF-8.
        """
        check_text(text, "the prompt")
        ids: list[int] = self.backend.encode(text, add_special_tokens=False).ids
        if self.adds_bos and self.bos_id is not None and ids[:1] != [self.bos_id]:
            ids.insert(0, self.bos_id)
        return ids

    def decode(self, token_ids: Sequence[int], *, special: bool = False) -> str:
        """Text of token ids, with special tokens left out unless ``special``."""
        return str(self.backend.decode(list(token_ids), skip_special_tokens=not special))

    def added_id(self, text: str) -> int | None:
        """The id of an added token that is spelled exactly so, or None."""
        id_ = self.backend.token_to_id(text)
        return id_ if id_ in self.backend.get_added_tokens_decoder() else None

    def _wants_bos(self, config: Mapping[str, Any]) -> bool:
        if isinstance(config.get("add_bos_token"), bool):
            return bool(config["add_bos_token"])
        return self.bos_id in self.backend.encode("a").ids[:1]  # the post-processor decides

    def _declared_eos(self) -> frozenset[int]:
        eos = self.special_tokens.get("eos_token")
        id_ = None if eos is None else self.backend.token_to_id(eos)
        return frozenset() if id_ is None else frozenset((id_,))


def check_text(text: str, what: str) -> None:
    """Refuse text that cannot be written as UTF-8.

    Raises:
        PromptError: names the first character that cannot.
    """
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise PromptError(
            f"{what}: expected Unicode text, got {text[error.start]!r} at position {error.start}",
            hint="Save or type the text as UTF-8.",
        ) from error


def _special_tokens(config: Mapping[str, Any]) -> dict[str, str]:
    tokens = {}
    for name in SPECIAL_NAMES:
        value = config.get(name)
        content = value.get("content") if isinstance(value, dict) else value
        if isinstance(content, str):
            tokens[name] = content
    return tokens


def _ids(value: object, where: str) -> list[int]:
    items: list[object] = value if isinstance(value, list) else [] if value is None else [value]
    ids = [id_ for id_ in items if isinstance(id_, int) and not isinstance(id_, bool)]
    if len(ids) != len(items):
        raise BundleError(f"{where}: expected an integer or a list of integers, got {value!r}")
    return ids
