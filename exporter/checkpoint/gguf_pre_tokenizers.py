"""How byte-level vocabularies split text before the merges, by ``tokenizer.ggml.pre``.

GGUF stores only the name; the expressions behind the names are llama.cpp's, which took them from the
models' own tokenizer.json files.
"""

from __future__ import annotations

from dataclasses import dataclass

from tokenizers import Regex, pre_tokenizers

from cpm_edge.exporter.errors import CheckpointError

CONTRACTION = "(?i:'s|'t|'re|'ve|'m|'ll|'d)"
WORD = r"[^\r\n\p{L}\p{N}]?\p{L}+"
REST = r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"


@dataclass(frozen=True)
class PreTokenizer:
    """Expressions applied one after the other, each match a piece of its own.

    Attributes:
        splits: the expressions.
        ignore_merges: a piece that is in the vocabulary is taken whole, merges or not.
        add_bos: whether a file that does not say so wants the BOS token.
    """

    splits: tuple[str, ...]
    ignore_merges: bool = False
    add_bos: bool = False


GPT_2 = PreTokenizer((GPT2,))
DIGITS_THEN_GPT2 = PreTokenizer((r"\p{N}", GPT2))
LLAMA_3 = PreTokenizer((rf"{CONTRACTION}|{WORD}|\p{{N}}{{1,3}}|{REST}",), ignore_merges=True, add_bos=True)
PRE_TOKENIZERS = {
    "default": PreTokenizer((r"[\p{P}\$\+<=>\^~\|]+", GPT2, r"\p{N}+", "[0-9][0-9][0-9]")),
    "gpt-2": GPT_2,
    "smollm": DIGITS_THEN_GPT2,
    "llama3": LLAMA_3,
    "llama-v3": LLAMA_3,
    "llama-bpe": LLAMA_3,
    "minicpm5": PreTokenizer((r"\p{N}{1,3}", rf"{CONTRACTION}|{WORD}|\p{{N}}+|{REST}"), ignore_merges=True),
}


def find_pre_tokenizer(name: str) -> PreTokenizer:
    """The splits called ``name``.

    Raises:
        CheckpointError: the name is not known; guessing would tokenize text differently from training.
    """
    if name not in PRE_TOKENIZERS:
        raise CheckpointError(
            f"tokenizer.ggml.pre: expected one of {', '.join(PRE_TOKENIZERS)}, got {name!r}"
        )
    return PRE_TOKENIZERS[name]


def build_pre_tokenizer(pre: PreTokenizer) -> pre_tokenizers.PreTokenizer:
    """The splits, then bytes written as the printable characters of GPT-2's vocabulary."""
    splits = [pre_tokenizers.Split(Regex(split), behavior="isolated") for split in pre.splits]
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    return pre_tokenizers.Sequence([*splits, byte_level])
