from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

from cpm_edge.exporter.checkpoint import open_checkpoint
from cpm_edge.exporter.checkpoint.gguf_pre_tokenizers import PRE_TOKENIZERS, build_pre_tokenizer
from cpm_edge.exporter.checkpoint.gguf_tokenizer import build_gguf_tokenizer
from cpm_edge.exporter.errors import CheckpointError
from tests.exporter.checkpoint.builders import model_weights, write_gguf, write_json
from tests.exporter.checkpoint.test_sentencepiece_tokenizer import train as train_sentencepiece
from tests.exporter.checkpoint.texts import CORPUS, SAMPLES

# As in Llama 3's tokenizer.json.
LLAMA_3_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
ORIGINALS: dict[str, Callable[[], pre_tokenizers.PreTokenizer]] = {
    "gpt-2": lambda: pre_tokenizers.ByteLevel(add_prefix_space=False),
    "smollm": lambda: pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    ),
    "llama-bpe": lambda: pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(LLAMA_3_SPLIT), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    ),
}


def train_bytes(pre: str) -> tuple[Tokenizer, dict[str, Any]]:
    """A byte-level tokenizer as a model's author would make it, and the GGUF metadata of it."""
    original = Tokenizer(models.BPE(ignore_merges=pre == "llama-bpe"))
    original.pre_tokenizer = ORIGINALS[pre]()
    original.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=500,
        show_progress=False,
        special_tokens=["<|endoftext|>", "<|im_start|>", "<|im_end|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )
    original.train_from_iterator(CORPUS, trainer)
    original.add_tokens(["<think>"])
    model = json.loads(original.to_str())["model"]
    tokens = [*sorted(model["vocab"], key=model["vocab"].get), "<think>"]
    types = [3, 3, 3] + [1] * (len(tokens) - 4) + [4]
    metadata = {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": pre,
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": types,
        "tokenizer.ggml.merges": [" ".join(merge) for merge in model["merges"]],
        "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.eos_token_id": 2,
        "tokenizer.ggml.add_bos_token": False,
    }
    return original, metadata


@pytest.mark.parametrize("pre", sorted(ORIGINALS))
def test_byte_level_ids_equal_the_original(pre: str) -> None:
    original, metadata = train_bytes(pre)
    rebuilt = build_gguf_tokenizer(metadata)
    for text in [*SAMPLES, "<|im_start|>user\nhi<|im_end|>", "a<think>b</think>"]:
        ids = original.encode(text).ids
        assert rebuilt.encode(text).ids == ids, text
        assert rebuilt.decode(ids, skip_special_tokens=False) == text
    assert rebuilt.decode(rebuilt.encode("<|im_start|>a<think>").ids) == "a<think>"


@pytest.mark.parametrize(
    ("pre", "pieces"),
    [
        ("default", ["it", "'", "s", " ", "123", "45", "  ", " x", "!?"]),
        ("gpt-2", ["it", "'s", " 12345", "  ", " x", "!?"]),
        ("smollm", ["it", "'s", " ", "1", "2", "3", "4", "5", "  ", " x", "!?"]),
        ("llama-bpe", ["it", "'s", " ", "123", "45", "  ", " x", "!?"]),
        ("minicpm5", ["it", "'s", " ", "123", "45", "  ", " x", "!?"]),
    ],
)
def test_splits(pre: str, pieces: list[str]) -> None:
    text = "it's 12345   x!?"
    found = build_pre_tokenizer(PRE_TOKENIZERS[pre]).pre_tokenize_str(text)
    assert [text[start:end] for _, (start, end) in found] == pieces


def test_minicpm5_keeps_spaces_before_digits_together() -> None:
    text = "a  1"
    for pre, pieces in (("llama-bpe", ["a", " ", " ", "1"]), ("minicpm5", ["a", "  ", "1"])):
        found = build_pre_tokenizer(PRE_TOKENIZERS[pre]).pre_tokenize_str(text)
        assert [text[start:end] for _, (start, end) in found] == pieces


def spm_metadata(path: Path) -> tuple[Any, dict[str, Any]]:
    reference = train_sentencepiece(path)
    ids = range(reference.get_piece_size())
    types = [
        2 if reference.is_unknown(i) else 3 if reference.is_control(i) else 6 if reference.is_byte(i) else 1
        for i in ids
    ]
    return reference, {
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.tokens": [reference.id_to_piece(i) for i in ids],
        "tokenizer.ggml.scores": [reference.get_score(i) for i in ids],
        "tokenizer.ggml.token_type": types,
        "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.eos_token_id": 2,
    }


def test_sentencepiece_ids_equal_the_original(tmp_path: Path) -> None:
    reference, metadata = spm_metadata(tmp_path / "tokenizer.model")
    rebuilt = build_gguf_tokenizer(metadata)
    for text in SAMPLES:
        assert rebuilt.encode(text).ids == [1, *reference.encode(text)], text
    plain = build_gguf_tokenizer(metadata | {"tokenizer.ggml.add_bos_token": False})
    assert plain.encode("the dog").ids == reference.encode("the dog")


def test_scores_that_are_all_equal_are_no_tokenizer(tmp_path: Path) -> None:
    _, metadata = spm_metadata(tmp_path / "tokenizer.model")
    count = len(metadata["tokenizer.ggml.tokens"])
    with pytest.raises(CheckpointError, match=r"token scores are -1000\.0"):
        build_gguf_tokenizer(metadata | {"tokenizer.ggml.scores": [-1000.0] * count})


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("merges", None, "merges is missing"),
        ("tokens", None, "tokens is missing"),
        ("pre", "deepseek-llm", "expected one of default, gpt-2, .*, got 'deepseek-llm'"),
        ("model", "bert", "expected gpt2 or llama, got 'bert'"),
        ("merges", ["q"], "'q' does not join two tokens"),
        ("merges", ["nope nope"], "'nope nope' does not join"),
    ],
)
def test_incomplete_metadata_is_named(key: str, value: Any, message: str) -> None:
    _, metadata = train_bytes("gpt-2")
    metadata[f"tokenizer.ggml.{key}"] = value
    with pytest.raises(CheckpointError, match=message):
        build_gguf_tokenizer({name: item for name, item in metadata.items() if item is not None})


def test_control_tokens_called_normal_are_still_matched_whole() -> None:
    original, metadata = train_bytes("gpt-2")
    metadata["tokenizer.ggml.token_type"] = [1] * len(metadata["tokenizer.ggml.tokens"])
    text = "<|im_start|>user<|im_end|>"
    assert build_gguf_tokenizer(metadata).encode(text).ids == original.encode(text).ids


def test_a_type_list_of_another_length_is_refused() -> None:
    _, metadata = train_bytes("gpt-2")
    metadata["tokenizer.ggml.token_type"] = [1]
    with pytest.raises(CheckpointError, match=r"token_type: expected \d+ entries, got 1"):
        build_gguf_tokenizer(metadata)


def test_duplicate_tokens_are_refused() -> None:
    _, metadata = train_bytes("gpt-2")
    tokens = metadata["tokenizer.ggml.tokens"]
    tokens[10] = tokens[11]
    with pytest.raises(CheckpointError, match="as id 10 and as id 11"):
        build_gguf_tokenizer(metadata)


class TestAssets:
    TEMPLATE = "{{ messages[0].content }}"

    @pytest.fixture
    def path(self, tmp_path: Path) -> Path:
        return self.write(tmp_path)

    def write(self, folder: Path, **changes: Any) -> Path:
        metadata = train_bytes("smollm")[1] | {"tokenizer.chat_template": self.TEMPLATE}
        metadata |= {f"tokenizer.ggml.{key}": value for key, value in changes.items()}
        return write_gguf(folder / "tiny.gguf", model_weights(), metadata=metadata)

    def assets(self, path: Path) -> dict[str, Any]:
        with open_checkpoint(str(path)) as checkpoint:
            return checkpoint.assets()

    def test_everything_comes_from_the_metadata(self, path: Path) -> None:
        assets = self.assets(path)
        assert set(assets) == {
            "tokenizer.json",
            "tokenizer_config.json",
            "chat_template.jinja",
            "generation_config.json",
        }
        assert Tokenizer.from_str(assets["tokenizer.json"].decode()).encode("<|im_end|>").ids == [2]
        assert assets["chat_template.jinja"].decode() == self.TEMPLATE
        settings = json.loads(assets["tokenizer_config.json"])
        assert (settings["bos_token"], settings["eos_token"]) == ("<|im_start|>", "<|im_end|>")
        assert (settings["add_bos_token"], settings["model_max_length"]) == (False, 128)
        generation = json.loads(assets["generation_config.json"])
        assert generation == {"bos_token_id": 1, "eos_token_id": [2, 0]}

    def test_a_tokenizer_that_cannot_be_rebuilt_is_an_error_with_a_hint(self, tmp_path: Path) -> None:
        path = self.write(tmp_path, pre="unheard-of")
        with open_checkpoint(str(path)) as checkpoint:
            assert checkpoint.config["vocab_size"] == 16
            with pytest.raises(CheckpointError, match=r"no usable tokenizer: .*unheard-of") as caught:
                checkpoint.assets()
        assert "tokenizer.json" in str(caught.value.hint) and "beside the GGUF" in str(caught.value.hint)

    def test_files_beside_the_gguf_win(self, tmp_path: Path) -> None:
        path = self.write(tmp_path, pre="unheard-of")
        original, _ = train_bytes("smollm")
        original.save(str(tmp_path / "tokenizer.json"))
        assets = self.assets(path)
        assert assets["tokenizer.json"] == tmp_path / "tokenizer.json"
        assert assets["chat_template.jinja"] == self.TEMPLATE.encode()

        write_json(tmp_path / "tokenizer_config.json", {"chat_template": "own"})
        assets = self.assets(path)
        assert assets["tokenizer_config.json"] == tmp_path / "tokenizer_config.json"
        assert "chat_template.jinja" not in assets

        (tmp_path / "chat_template.jinja").write_text("own")
        assert self.assets(path)["chat_template.jinja"] == tmp_path / "chat_template.jinja"

    def test_a_tokenizer_of_another_model_beside_it_is_refused(self, path: Path) -> None:
        other = Tokenizer(models.BPE())
        other.add_tokens([f"word{i}" for i in range(500)])
        other.save(str(path.parent / "tokenizer.json"))
        with pytest.raises(CheckpointError, match=r"is of another model: 0 of \d+ tokens agree"):
            self.assets(path)
        (path.parent / "tokenizer.json").write_text("{")
        with pytest.raises(CheckpointError, match="not a readable tokenizer"):
            self.assets(path)
