from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from tokenizers import processors

from cpm_edge.runtimes.bundle import hash_files, open_bundle, write_manifest
from cpm_edge.runtimes.errors import BundleError
from cpm_edge.runtimes.tokenizer import Tokenizer
from tests.runtimes.fakes import byte_level_tokenizer, make_bundle, manifest, sentencepiece_tokenizer

BOS_EOS = {"bos_token": {"content": "<s>", "lstrip": False}, "eos_token": "</s>"}


def with_post_processor(tail: str = "") -> Any:
    backend = sentencepiece_tokenizer()
    backend.post_processor = processors.TemplateProcessing(
        single=f"<s> $A{tail}", special_tokens=[("<s>", 1), ("</s>", 2)]
    )
    return backend


@pytest.mark.parametrize(
    ("processor", "add_bos_token", "expected"),
    [
        (False, None, False),
        (False, True, True),
        (False, False, False),
        (True, None, True),
        (True, False, False),
    ],
)
def test_bos_comes_once_or_not_at_all(processor: bool, add_bos_token: bool | None, expected: bool) -> None:
    backend = with_post_processor(" </s>") if processor else sentencepiece_tokenizer()
    config = BOS_EOS | ({} if add_bos_token is None else {"add_bos_token": add_bos_token})
    tokenizer = Tokenizer(backend, config)
    ids = tokenizer.encode("ab")
    assert (ids[0] == tokenizer.bos_id) is expected
    assert backend.token_to_id("</s>") not in ids
    written_out = tokenizer.encode("<s>ab")
    assert written_out.count(tokenizer.bos_id) == 1  # type: ignore[arg-type]
    assert written_out[0] == tokenizer.bos_id


def test_saved_truncation_and_padding_are_off() -> None:
    backend = byte_level_tokenizer()
    backend.enable_truncation(3)
    backend.enable_padding(length=64)
    assert len(Tokenizer(backend, {}).encode("hello hello")) > 3
    assert len(Tokenizer(backend, {}).encode("a")) == 1


@pytest.mark.parametrize(
    ("generation", "config", "expected"),
    [
        ({"eos_token_id": [2, 260]}, {"eos_token_id": 1}, {1, 2, 260}),
        ({"eos_token_id": 260}, {}, {260}),
        ({}, {"eos_token_id": 2}, {2}),
        ({}, {}, {1}),
    ],
)
def test_every_end_of_sequence_id_counts(
    tmp_path: Path, generation: dict[str, Any], config: dict[str, Any], expected: set[int]
) -> None:
    folder = make_bundle(tmp_path / "b", {"generation_config.json": generation, "config.json": config})
    assert Tokenizer.from_bundle(open_bundle(folder)).eos_ids == expected


@pytest.mark.parametrize("value", ["</s>", [1, "x"], True])
def test_malformed_eos_ids(tmp_path: Path, value: Any) -> None:
    folder = make_bundle(tmp_path / "b", {"config.json": {"eos_token_id": value}})
    with pytest.raises(BundleError, match=r"config.json: eos_token_id: expected an integer or a list"):
        Tokenizer.from_bundle(open_bundle(folder))


def test_an_unreadable_tokenizer_says_so(tmp_path: Path) -> None:
    folder = make_bundle(tmp_path / "b")
    (folder / "tokenizer.json").write_text('{"model": "of the future"}')
    write_manifest(folder, manifest(hash_files(folder)))
    with pytest.raises(BundleError, match=r"tokenizer.json: tokenizers .* cannot read it"):
        Tokenizer.from_bundle(open_bundle(folder))


def test_added_ids_and_decoding() -> None:
    tokenizer = Tokenizer(byte_level_tokenizer(), {})
    ids = tokenizer.encode("he<|im_end|>")
    assert tokenizer.decode(ids) == "he"
    assert tokenizer.decode(ids, special=True) == "he<|im_end|>"
    assert tokenizer.added_id("<|im_end|>") == ids[-1]
    assert tokenizer.added_id("he") is None
    assert tokenizer.added_id("not there") is None
