from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import pytest
import sentencepiece
from tokenizers import Tokenizer

from cpm_edge.exporter.checkpoint.folder_assets import load_folder_assets
from cpm_edge.exporter.checkpoint.sentencepiece_tokenizer import convert_sentencepiece
from cpm_edge.exporter.checkpoint.spm_tokenizer import Vocabulary, merges_from_scores
from cpm_edge.exporter.errors import CheckpointError
from tests.exporter.checkpoint.builders import write_json
from tests.exporter.checkpoint.texts import CORPUS, SAMPLES

NO_BOS = {"add_bos_token": False}
LLAMA = {"normalization_rule_name": "identity", "remove_extra_whitespaces": False}


def train(path: Path, **options: Any) -> sentencepiece.SentencePieceProcessor:
    """A small model trained as Llama's was, unless ``options`` say otherwise."""
    model = io.BytesIO()
    settings: dict[str, Any] = (
        {"model_type": "bpe", "vocab_size": 420, "byte_fallback": True} | LLAMA | options
    )
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(CORPUS), model_writer=model, minloglevel=2, **settings
    )
    path.write_bytes(model.getvalue())
    return sentencepiece.SentencePieceProcessor(model_proto=model.getvalue())


def convert(path: Path, settings: dict[str, Any] | None = None) -> Tokenizer:
    return Tokenizer.from_str(convert_sentencepiece(path, NO_BOS if settings is None else settings).decode())


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"add_dummy_prefix": False},
        {"remove_extra_whitespaces": True},
        {"normalization_rule_name": "nmt_nfkc"},
        {"split_digits": True, "vocab_size": 500},
    ],
    ids=["llama", "no prefix", "collapse", "nfkc", "digits"],
)
def test_ids_equal_those_of_sentencepiece(tmp_path: Path, options: dict[str, Any]) -> None:
    path = tmp_path / "tokenizer.model"
    reference, converted = train(path, **options), convert(path)
    assert converted.get_vocab_size() == reference.get_piece_size()
    for text in SAMPLES:
        if "normalization_rule_name" in options:
            # tokenizers applies the map per grapheme and takes "\r\n" as one; SentencePiece makes it two.
            text = text.replace("\r\n", "\n")
        ids = reference.encode(text)
        assert converted.encode(text).ids == ids, text
        if "remove_extra_whitespaces" not in options:  # SentencePiece then drops more leading spaces
            assert converted.decode(ids) == reference.decode(ids)


def test_added_tokens_get_their_ids_and_bos_is_prepended(tmp_path: Path) -> None:
    path = tmp_path / "tokenizer.model"
    size = train(path, user_defined_symbols=["<用户>", "<AI>"]).get_piece_size()
    settings = {
        "added_tokens_decoder": {
            "1": {"content": "<s>", "special": True},
            str(size + 1): {"content": "<|tool_call|>", "special": False},
            str(size): {"content": "<|im_end|>", "special": True},
        },
        "bos_token": {"content": "<s>", "lstrip": False},
    }
    tokenizer = convert(path, settings)
    encoding = tokenizer.encode("<用户>hi<|im_end|><|tool_call|>")
    assert encoding.tokens[:2] == ["<s>", "<用户>"]
    assert encoding.ids[-2:] == [size, size + 1]
    assert tokenizer.decode(encoding.ids) == "<用户> hi<|tool_call|>"
    assert tokenizer.decode(encoding.ids, skip_special_tokens=False).endswith("<|im_end|><|tool_call|>")


def test_eos_is_appended_only_on_demand(tmp_path: Path) -> None:
    path = tmp_path / "tokenizer.model"
    train(path)
    assert convert(path, {}).encode("a").tokens[0] == "<s>"
    assert convert(path, {}).encode("a").tokens[-1] != "</s>"
    assert convert(path, {"add_eos_token": True}).encode("a").tokens[-1] == "</s>"


def test_without_legacy_only_the_start_gets_a_prefix_space(tmp_path: Path) -> None:
    path = tmp_path / "tokenizer.model"
    size = train(path).get_piece_size()
    added = {"added_tokens_decoder": {str(size): {"content": "<x>", "special": True}}}
    legacy = convert(path, NO_BOS | added).encode("the<x>the").tokens
    modern = convert(path, NO_BOS | added | {"legacy": False}).encode("the<x>the").tokens
    assert legacy == ["▁the", "<x>", "▁the"]
    assert modern[:2] == ["▁the", "<x>"] and "".join(modern[2:]) == "the"


def test_added_tokens_with_a_gap_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "tokenizer.model"
    size = train(path).get_piece_size()
    settings = {"added_tokens_decoder": {str(size + 5): {"content": "<x>"}}}
    with pytest.raises(CheckpointError, match=f"'<x>': expected id {size + 5}, got {size}"):
        convert(path, settings)


@pytest.mark.parametrize("content", [b"", b"\xff\xff\xff\xff", b"not a model"])
def test_other_files_are_refused(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "tokenizer.model"
    path.write_bytes(content)
    with pytest.raises(CheckpointError, match="SentencePiece model"):
        convert(path)


def test_unigram_models_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "tokenizer.model"
    train(path, model_type="unigram", vocab_size=370)
    with pytest.raises(CheckpointError, match="of type BPE"):
        convert(path)


def test_merges_are_ranked_by_score_and_skip_other_pieces() -> None:
    vocabulary = Vocabulary(
        ["<s>", "s", ">", "<", "a", "b", "ab", "aba", "ba"],
        [0.0, -5.0, -6.0, -7.0, -8.0, -9.0, -2.0, -3.0, -1.0],
        [3, 1, 1, 1, 1, 1, 1, 1, 1],
    )
    assert merges_from_scores(vocabulary) == [("b", "a"), ("a", "b"), ("ab", "a"), ("a", "ba")]


def test_equal_scores_give_no_merges() -> None:
    with pytest.raises(CheckpointError, match="all 3 token scores are -1000"):
        merges_from_scores(Vocabulary(["a", "b", "ab"], [-1000.0] * 3, [1] * 3))


class TestFolderAssets:
    def test_files_are_passed_on_by_name(self, tmp_path: Path) -> None:
        names = ["tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "generation_config.json"]
        for name in [*names, "modeling_minicpm.py", "vocab.txt"]:
            (tmp_path / name).write_text("{}")
        assert load_folder_assets(tmp_path) == {name: tmp_path / name for name in names}

    def test_tokenizer_model_is_converted_with_the_older_list_of_added_tokens(self, tmp_path: Path) -> None:
        size = train(tmp_path / "tokenizer.model").get_piece_size()
        write_json(tmp_path / "added_tokens.json", {"<|im_end|>": size, "<|text|>": size + 1})
        write_json(tmp_path / "special_tokens_map.json", {"eos_token": {"content": "<|im_end|>"}})
        assets = load_folder_assets(tmp_path)
        assert set(assets) == {"tokenizer.json", "tokenizer_config.json", "special_tokens_map.json"}
        content = assets["tokenizer.json"]
        assert isinstance(content, bytes)
        tokenizer = Tokenizer.from_str(content.decode())
        ids = tokenizer.encode("hi<|im_end|><|text|>").ids
        assert ids[-2:] == [size, size + 1]
        assert tokenizer.decode(ids) == "hi<|text|>"

    def test_no_tokenizer_is_an_error_with_a_hint(self, tmp_path: Path) -> None:
        with pytest.raises(CheckpointError, match="no tokenizer") as caught:
            load_folder_assets(tmp_path)
        assert "tokenizer.json" in str(caught.value.hint)
