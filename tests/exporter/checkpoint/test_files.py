from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from cpm_edge.exporter.checkpoint.files import PositionalFile, fingerprint_file, read_json_object
from cpm_edge.exporter.errors import CheckpointError

CONTENT = bytes(range(256))


@pytest.fixture(scope="module")
def content_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("files") / "content"
    path.write_bytes(CONTENT)
    return path


@pytest.mark.parametrize("positional", [True, False], ids=["preadv", "seek"])
@given(offset=st.integers(0, 300), nbytes=st.integers(0, 300))
def test_read_returns_exactly_those_bytes_or_says_what_is_missing(
    content_file: Path, positional: bool, offset: int, nbytes: int
) -> None:
    with pytest.MonkeyPatch.context() as patch:
        if not positional:
            patch.delattr(os, "preadv", raising=False)
        file = PositionalFile(content_file)
        try:
            if offset + nbytes <= len(CONTENT):
                assert file.read(offset, nbytes).tobytes() == CONTENT[offset : offset + nbytes]
            else:
                with pytest.raises(CheckpointError, match="the file has 256 bytes"):
                    file.read(offset, nbytes)
        finally:
            file.close()


def test_read_gives_a_writable_array_of_its_own(content_file: Path) -> None:
    file = PositionalFile(content_file)
    first = file.read(0, 4)
    first[:] = 9
    np.testing.assert_array_equal(file.read(0, 4), [0, 1, 2, 3])
    file.close()


def test_a_file_cut_while_open_is_an_error(tmp_path: Path) -> None:
    path = tmp_path / "cut"
    path.write_bytes(b"x" * 100)
    file = PositionalFile(path)
    path.write_bytes(b"x" * 10)
    with pytest.raises(CheckpointError, match="ended at 10"):
        file.read(0, 100)
    file.close()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"{", "not valid JSON"),
        (b"[1]", "expected a JSON object, got list"),
        (b"\xff\xfe", "cannot be read"),
        (b"[" * 100_000, "not valid JSON"),
    ],
    ids=["cut", "list", "encoding", "nested"],
)
def test_json_errors_name_the_file(tmp_path: Path, content: bytes, message: str) -> None:
    path = tmp_path / "config.json"
    path.write_bytes(content)
    with pytest.raises(CheckpointError, match=message) as caught:
        read_json_object(path)
    assert "config.json" in caught.value.message


def test_fingerprint_sees_size_head_and_tail(tmp_path: Path) -> None:
    base = bytearray(5 << 20)
    path = tmp_path / "weights"

    def fingerprint(content: bytes) -> str:
        path.write_bytes(content)
        found = fingerprint_file(path)
        assert found["bytes"] == len(content)
        return str(found["sha256_head"])

    changed_head, changed_tail = bytearray(base), bytearray(base)
    changed_head[5], changed_tail[-5] = 1, 1
    hashes = [fingerprint(bytes(content)) for content in (base, changed_head, changed_tail, base + b"\0")]
    assert len(set(hashes)) == 4
    assert fingerprint(bytes(base)) == hashes[0]
    assert fingerprint(b"{}") != fingerprint(b"{ }")
