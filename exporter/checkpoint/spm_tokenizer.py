"""A SentencePiece BPE vocabulary as a ``tokenizers`` pipeline, laid out like LlamaTokenizerFast.

SentencePiece merges the neighbours whose union has the best score; the tokenizers library merges by
rank. Ranking every split of every piece by the piece's score makes the two the same.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from enum import IntEnum
from typing import Any

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors

from cpm_edge.exporter.errors import CheckpointError

SPACE = "\u2581"


class PieceType(IntEnum):
    """The numbers of sentencepiece_model.proto, which ``tokenizer.ggml.token_type`` shares."""

    NORMAL = 1
    UNKNOWN = 2
    CONTROL = 3
    USER_DEFINED = 4
    UNUSED = 5
    BYTE = 6


@dataclass(frozen=True)
class Vocabulary:
    """Pieces in id order, with their scores and types."""

    pieces: Sequence[str]
    scores: Sequence[float]
    types: Sequence[int]

    def ids(self) -> dict[str, int]:
        """Piece to id.

        Raises:
            CheckpointError: a piece occurs twice, so that one of its ids could never be produced.
        """
        ids: dict[str, int] = {}
        for index, piece in enumerate(self.pieces):
            if ids.setdefault(piece, index) != index:
                raise CheckpointError(f"the vocabulary has {piece!r} as id {ids[piece]} and as id {index}")
        return ids


@dataclass(frozen=True)
class SpmOptions:
    """How text is normalised before the merges; the defaults are Llama's."""

    unk_token: str = "<unk>"
    byte_fallback: bool = True
    add_prefix_space: bool = True
    legacy: bool = True  # a prefix space after every added token, not only at the start
    collapse_spaces: bool = False
    charsmap: bytes = b""
    added: Sequence[tuple[int, AddedToken]] = field(default_factory=list)


def build_spm(vocabulary: Vocabulary, options: SpmOptions) -> Tokenizer:
    """The tokenizer, without a post-processor.

    Raises:
        CheckpointError: duplicate pieces, no scores to derive merges from, or added tokens whose ids
            do not follow the vocabulary.
    """
    ids = vocabulary.ids()
    model = models.BPE(
        vocab=ids,
        merges=merges_from_scores(vocabulary),
        unk_token=options.unk_token if options.unk_token in ids else None,
        fuse_unk=True,
        byte_fallback=options.byte_fallback,
    )
    tokenizer = Tokenizer(model)
    tokenizer.normalizer = _normalizer(options)
    if not options.legacy:
        scheme = "first" if options.add_prefix_space else "never"
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(SPACE, prepend_scheme=scheme, split=False)
    tokenizer.decoder = _decoder(options.add_prefix_space)
    add_tokens(tokenizer, [*_typed_tokens(vocabulary), *options.added])
    return tokenizer


def merges_from_scores(vocabulary: Vocabulary) -> list[tuple[str, str]]:
    """Every way to put a normal piece together from two, best piece first; ties: longest left part.

    Raises:
        CheckpointError: all scores are equal (some converters write -1000 throughout): no order.
    """
    score_of = {
        piece: score
        for piece, score, kind in zip(vocabulary.pieces, vocabulary.scores, vocabulary.types, strict=True)
        if kind == PieceType.NORMAL
    }
    if len(score_of) > 1 and len(set(score_of.values())) == 1:
        raise CheckpointError(f"all {len(score_of)} token scores are {next(iter(score_of.values()))}")
    ranked: list[tuple[float, int, int, str, str]] = []
    for piece, score in score_of.items():
        for cut in range(1, len(piece)):
            left, right = piece[:cut], piece[cut:]
            if left in score_of and right in score_of:
                ranked.append((-score, -len(left), -len(right), left, right))
    ranked.sort(key=lambda item: item[:3])
    return [item[3:] for item in ranked]


def add_tokens(tokenizer: Tokenizer, tokens: Sequence[tuple[int, AddedToken]]) -> None:
    """Add tokens under the given ids, later entries winning over earlier ones.

    Raises:
        CheckpointError: an id does not follow those before it; the library can only append.
    """
    latest = dict(tokens)
    for expected, token in sorted(latest.items()):
        add = tokenizer.add_special_tokens if token.special else tokenizer.add_tokens
        add([token])
        got = tokenizer.token_to_id(token.content)
        if got != expected:
            raise CheckpointError(f"added token {token.content!r}: expected id {expected}, got {got}")


def set_template(tokenizer: Tokenizer, bos: str | None, eos: str | None) -> None:
    """Make ``encode`` put ``bos`` before and ``eos`` after each sequence; None leaves it out."""
    if bos is None and eos is None:
        return
    special = [(token, tokenizer.token_to_id(token)) for token in {bos, eos} if token is not None]
    for token, token_id in special:
        if token_id is None:
            raise CheckpointError(f"the special token {token!r} is not in the vocabulary")
    single = [bos or "", "$A:0", eos or ""]
    second = [bos or "", "$B:1", eos or ""]
    tokenizer.post_processor = processors.TemplateProcessing(
        single=" ".join(filter(None, single)),
        pair=" ".join(filter(None, single + second)),
        special_tokens=special,
    )


def _typed_tokens(vocabulary: Vocabulary) -> list[tuple[int, AddedToken]]:
    """Control pieces are special; user-defined ones are matched whole, but are text."""
    whole = {PieceType.CONTROL: True, PieceType.UNKNOWN: True, PieceType.USER_DEFINED: False}
    return [
        (index, AddedToken(piece, normalized=False, special=whole[PieceType(kind)]))
        for index, (piece, kind) in enumerate(zip(vocabulary.pieces, vocabulary.types, strict=True))
        if kind in whole
    ]


def _normalizer(options: SpmOptions) -> Any:
    steps: list[Any] = []
    if options.charsmap:
        steps.append(normalizers.Precompiled(options.charsmap))
    if options.collapse_spaces:
        steps += [normalizers.Replace(Regex(r"\A +| +\z"), ""), normalizers.Replace(Regex(" {2,}"), " ")]
    if options.legacy:
        if options.add_prefix_space:
            steps.append(normalizers.Prepend(SPACE))
        steps.append(normalizers.Replace(" ", SPACE))
    return normalizers.Sequence(steps) if steps else None


def _decoder(add_prefix_space: bool) -> Any:
    steps: list[Any] = [decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse()]
    if add_prefix_space:
        steps.append(decoders.Strip(content=" ", left=1))
    return decoders.Sequence(steps)
