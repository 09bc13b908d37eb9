"""How to generate: the options, their checks, and their defaults from generation_config.json."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from cpm_edge.runtimes.errors import BundleError, OptionError


@dataclass(frozen=True)
class GenerationOptions:
    """Options of one generation.

    Attributes:
        max_new_tokens: stop after so many tokens; None goes on until end of sequence or of the context.
        temperature: 0 is greedy; otherwise logits are divided by it before sampling.
        top_k: sample among the k most likely tokens, 0 for all.
        top_p: sample among the fewest tokens whose probabilities reach top_p, 1 for all.
        min_p: drop tokens less likely than min_p times the most likely one.
        repetition_penalty: above 1 makes tokens of the prompt and the answer less likely, 1 is off.
        seed: makes sampling repeatable; None takes fresh entropy.
        stop: generation ends before the first of these strings, which is not part of the answer.
        ignore_eos: go on after an end-of-sequence token.
        special: keep special tokens such as <|im_end|> in the text.

    Raises:
        OptionError: a value is out of range.
    """

    max_new_tokens: int | None = None
    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    seed: int | None = None
    stop: tuple[str, ...] = ()
    ignore_eos: bool = False
    special: bool = False

    def __post_init__(self) -> None:
        # A single string is a likely slip: it would mean one stop string per letter.
        stop = (self.stop,) if isinstance(self.stop, str) else tuple(self.stop)
        object.__setattr__(self, "stop", stop)
        _require(
            self.max_new_tokens is None or self.max_new_tokens >= 1, self, "max_new_tokens", "at least 1"
        )
        _require(0 <= self.temperature < float("inf"), self, "temperature", "0 or more")
        _require(self.top_k >= 0, self, "top_k", "0 or more")
        _require(0 < self.top_p <= 1, self, "top_p", "above 0 and up to 1")
        _require(0 <= self.min_p <= 1, self, "min_p", "0 to 1")
        _require(0 < self.repetition_penalty < float("inf"), self, "repetition_penalty", "above 0")
        _require(self.seed is None or self.seed >= 0, self, "seed", "0 or more")
        _require(all(isinstance(s, str) and s for s in stop), self, "stop", "non-empty strings")

    def replace(self, **changes: Any) -> GenerationOptions:
        """A copy with some options changed.

        Raises:
            TypeError: there is no such option. OptionError: a value is out of range.
        """
        known = {field.name for field in dataclasses.fields(self)}
        if unknown := sorted(set(changes) - known):
            raise TypeError(f"unknown option {unknown[0]!r}; expected one of {', '.join(sorted(known))}")
        return dataclasses.replace(self, **changes)

    @classmethod
    def from_generation_config(cls, config: Mapping[str, Any]) -> GenerationOptions:
        """The model author's defaults. Greedy unless do_sample is true and a temperature is given.

        max_new_tokens is not taken over: authors set it for their demos.

        Raises:
            BundleError: a value of the file is out of range or of the wrong type.
        """
        sample = bool(config.get("do_sample")) and config.get("temperature") is not None
        names = ["repetition_penalty", *(("temperature", "top_k", "top_p", "min_p") if sample else ())]
        values = {name: config[name] for name in names if config.get(name) is not None}
        try:
            return cls(**values)
        except (ValueError, TypeError) as error:
            raise BundleError(
                f"generation_config.json: {error}", hint="Correct the file and export again."
            ) from error


def _require(ok: bool, options: GenerationOptions, name: str, expected: str) -> None:
    if not ok:
        raise OptionError(f"{name}: expected {expected}, got {getattr(options, name)!r}")
