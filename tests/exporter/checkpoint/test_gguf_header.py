from __future__ import annotations

from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cpm_edge.exporter.checkpoint import gguf_header
from cpm_edge.exporter.checkpoint.files import PositionalFile
from cpm_edge.exporter.checkpoint.gguf_header import GgufHeader, read_gguf_header
from cpm_edge.exporter.errors import CheckpointError
from tests.exporter.checkpoint.builders import model_weights, write_gguf

METADATA: dict[str, Any] = {
    "tokenizer.ggml.tokens": ["a", "ä", "你好", ""],
    "tokenizer.ggml.scores": [0.5, -1.0, 2.0, 3.0],
    "tokenizer.ggml.token_type": [1, 2, 3, 4],
    "tokenizer.ggml.add_bos_token": True,
    "tokenizer.chat_template": "x" * 1000,
}


def read(path: Path) -> GgufHeader:
    file = PositionalFile(path)
    try:
        return read_gguf_header(file)
    finally:
        file.close()


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    path = tmp_path_factory.mktemp("gguf") / "model.gguf"
    return write_gguf(path, model_weights(), metadata=METADATA).read_bytes()


@pytest.mark.parametrize("window", [8 << 20, 16])
def test_header_equals_what_the_gguf_package_reads(
    tmp_path: Path, whole: bytes, window: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gguf_header, "WINDOW", window)
    path = tmp_path / "model.gguf"
    path.write_bytes(whole)
    header, reference = read(path), gguf.GGUFReader(path)
    ours = {f"GGUF.{key}": None for key in ("version", "tensor_count", "kv_count")} | header.metadata
    assert set(ours) == set(reference.fields)
    for key, value in header.metadata.items():
        assert value == reference.fields[key].contents()
    assert len(header.tensors) == len(reference.tensors)
    for tensor in reference.tensors:
        found = header.tensors[tensor.name]
        assert found.shape == tuple(reversed(tensor.shape.tolist()))
        assert (found.type, found.offset) == (tensor.tensor_type, tensor.data_offset)


@given(data=st.data())
@settings(max_examples=80)
def test_every_truncation_is_found_at_open(
    tmp_path_factory: pytest.TempPathFactory, whole: bytes, data: st.DataObject
) -> None:
    path = tmp_path_factory.mktemp("cut") / "model.gguf"
    reader_end = max(t.offset + 4 * int(np.prod(t.shape)) for t in _tensors(path, whole))
    keep = data.draw(st.integers(0, reader_end - 1))
    path.write_bytes(whole[:keep])
    with pytest.raises(CheckpointError) as caught:
        read(path)
    assert "truncated" in str(caught.value.hint)


def _tensors(path: Path, whole: bytes) -> list[gguf_header.GgufTensor]:
    path.write_bytes(whole)
    return list(read(path).tensors.values())


@given(position=st.integers(0, 1500), value=st.integers(0, 255))
@settings(max_examples=200)
def test_a_flipped_byte_never_raises_anything_else(
    tmp_path_factory: pytest.TempPathFactory, whole: bytes, position: int, value: int
) -> None:
    path = tmp_path_factory.mktemp("flip") / "model.gguf"
    content = bytearray(whole)
    content[position] = value
    path.write_bytes(content)
    try:
        header = read(path)
    except CheckpointError:
        return
    size = len(content)
    assert all(0 <= tensor.offset <= size for tensor in header.tensors.values())


def test_truncated_tensor_data_tells_both_sizes(tmp_path: Path, whole: bytes) -> None:
    path = tmp_path / "model.gguf"
    path.write_bytes(whole[:-5000])
    with pytest.raises(CheckpointError, match=rf"expected \d+ bytes, got {len(whole) - 5000}"):
        read(path)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "not whole"),
        (b"PK\x03\x04" + bytes(100), "not a GGUF file"),
        (b"GGUF" + (1).to_bytes(4, "little") + bytes(100), "expected GGUF version 2 or 3, got 1"),
        (b"GGUF" + (3).to_bytes(4, "big") + bytes(100), "big-endian"),
    ],
    ids=["empty", "zip", "version", "byteorder"],
)
def test_other_files_are_refused(tmp_path: Path, content: bytes, message: str) -> None:
    path = tmp_path / "model.gguf"
    path.write_bytes(content)
    with pytest.raises(CheckpointError, match=message):
        read(path)
