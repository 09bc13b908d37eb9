from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.numpy import save, save_file

from cpm_edge.exporter.checkpoint import open_checkpoint
from cpm_edge.exporter.checkpoint.files import PositionalFile
from cpm_edge.exporter.checkpoint.safetensors_files import open_safetensors, read_header
from cpm_edge.exporter.errors import CheckpointError
from tests.exporter.checkpoint.builders import CONFIG, safetensors_bytes, write_json

WEIGHTS: dict[str, Any] = {
    "a": np.arange(24, dtype=np.float32).reshape(6, 4),
    "b": np.arange(6, dtype=np.float16),
    "c": np.arange(30, dtype=np.int32).reshape(5, 2, 3),
    "d": np.arange(8).astype(ml_dtypes.bfloat16).reshape(4, 2),
    "empty": np.zeros((0, 3), dtype=np.float32),
    "scalar": np.array(3.5, dtype=np.float32),
}


def read(path: Path) -> dict[str, Any]:
    file = PositionalFile(path)
    try:
        return dict(read_header(file))
    finally:
        file.close()


def test_rows_and_types_equal_what_was_saved(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    save_file(WEIGHTS, path, metadata={"format": "pt"})
    store = open_safetensors([path], None)
    assert set(store.tensors) == set(WEIGHTS)
    assert store.tensors["d"].dtype == "BF16"
    for name, weight in WEIGHTS.items():
        assert store.tensors[name].shape == weight.shape
        rows = weight.shape[0] if weight.ndim else 1
        whole = store.read_raw(name, 0, rows)
        assert whole.dtype == weight.dtype
        np.testing.assert_array_equal(whole, weight)
    part = store.read("c", 1, 4)
    assert part.dtype == np.float32 and part.flags.c_contiguous
    np.testing.assert_array_equal(part, WEIGHTS["c"][1:4].astype(np.float32))
    store.close()


def test_checkpoint_reads_ranges_and_refuses_others(tmp_path: Path) -> None:
    write_json(tmp_path / "config.json", CONFIG)
    save_file(WEIGHTS, tmp_path / "model.safetensors")
    with open_checkpoint(str(tmp_path)) as checkpoint:
        assert checkpoint.kind == "safetensors"
        assert checkpoint.config == CONFIG
        np.testing.assert_array_equal(checkpoint.read("a", 4), WEIGHTS["a"][4:])
        assert checkpoint.read("scalar") == np.float32(3.5)
        assert checkpoint.read("a", 2, 2).shape == (0, 4)
        for start, stop in ((0, 7), (-1, 2), (3, 2)):
            with pytest.raises(CheckpointError, match=r"a: expected rows within \[0, 6\)"):
                checkpoint.read("a", start, stop)
        with pytest.raises(CheckpointError, match="has no tensor missing"):
            checkpoint.read("missing")
        assert set(checkpoint.fingerprint()["files"]) == {"config.json", "model.safetensors"}


@given(cut=st.integers(0, 400))
@settings(max_examples=60)
def test_every_truncation_is_found_at_open(tmp_path_factory: pytest.TempPathFactory, cut: int) -> None:
    whole = save({name: WEIGHTS[name] for name in ("a", "b", "c")})
    path = tmp_path_factory.mktemp("cut") / "model.safetensors"
    path.write_bytes(whole[: min(cut, len(whole) - 1)])
    with pytest.raises(CheckpointError):
        read(path)


def test_truncated_data_tells_both_sizes(tmp_path: Path) -> None:
    whole = save(WEIGHTS)
    path = tmp_path / "model.safetensors"
    path.write_bytes(whole[:-3])
    with pytest.raises(CheckpointError, match=f"expected {len(whole)} bytes, got {len(whole) - 3}"):
        read(path)


@given(content=st.binary(max_size=200))
def test_garbage_is_refused(tmp_path_factory: pytest.TempPathFactory, content: bytes) -> None:
    path = tmp_path_factory.mktemp("garbage") / "model.safetensors"
    path.write_bytes(content)
    with pytest.raises(CheckpointError):
        read(path)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-10, 1 << 70) | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=8,
)


@given(
    dtype=JSON | st.sampled_from(["F32", "BF16"]),
    shape=JSON | st.lists(st.integers(0, 4), max_size=3),
    offsets=JSON | st.lists(st.integers(0, 64), min_size=2, max_size=2),
)
def test_only_entries_that_fit_their_bytes_pass(
    tmp_path_factory: pytest.TempPathFactory, dtype: Any, shape: Any, offsets: Any
) -> None:
    path = tmp_path_factory.mktemp("entry") / "model.safetensors"
    entry = {"dtype": dtype, "shape": shape, "data_offsets": offsets}
    path.write_bytes(safetensors_bytes({"w": entry}, bytes(32)))
    try:
        tensors = read(path)
    except CheckpointError:
        return
    itemsize = {"F32": 4, "BF16": 2}[dtype]
    assert offsets == [0, 32] and int(np.prod(shape)) * itemsize == 32
    assert tensors["w"].info.shape == tuple(shape)


def entry(begin: int, end: int) -> dict[str, Any]:
    return {"dtype": "U8", "shape": [end - begin], "data_offsets": [begin, end]}


@given(bounds=st.lists(st.tuples(st.integers(0, 12), st.integers(0, 12)), min_size=1, max_size=4))
@settings(max_examples=200)
def test_data_must_tile_the_file(
    tmp_path_factory: pytest.TempPathFactory, bounds: list[tuple[int, int]]
) -> None:
    spans = [(min(pair), max(pair)) for pair in bounds]
    path = tmp_path_factory.mktemp("tiles") / "model.safetensors"
    path.write_bytes(safetensors_bytes({str(i): entry(*span) for i, span in enumerate(spans)}, bytes(12)))
    covered = sorted(byte for begin, end in spans for byte in range(begin, end))
    empty_inside = any(
        begin == end and any(other[0] < begin < other[1] for other in spans) for begin, end in spans
    )
    if covered == list(range(12)) and not empty_inside:
        assert len(read(path)) == len(spans)
    else:
        with pytest.raises(CheckpointError):
            read(path)


@pytest.mark.parametrize(
    ("header", "data", "message"),
    [
        ({"w": entry(0, 4), "v": entry(2, 6)}, bytes(6), r"v at data bytes \[2, 6\) overlaps"),
        ({"w": entry(0, 4), "v": entry(5, 6)}, bytes(6), r"v at data bytes \[5, 6\) leaves a hole"),
        ({"w": entry(0, 4) | {"dtype": "F4"}}, bytes(4), "w: dtype 'F4' is not supported"),
        ({"w": entry(0, 4) | {"shape": [5]}}, bytes(4), r"w U8 \[5\]: expected 5 bytes, got 4"),
        ({"w": entry(0, 4) | {"shape": [-4]}}, bytes(4), "expected a list of sizes"),
        ({"w": entry(0, 4) | {"shape": [True]}}, bytes(4), "expected a list of sizes"),
        (b'{"w": 1, "w": 2}', b"", "a name occurs twice"),
        (b"[" * 100_000, b"", "not JSON"),
        (b"[]", b"", "not a JSON object"),
        (b"{}", b"x", "expected 10 bytes, got 11"),
    ],
)
def test_header_errors_say_what_is_wrong(tmp_path: Path, header: Any, data: bytes, message: str) -> None:
    path = tmp_path / "model.safetensors"
    path.write_bytes(safetensors_bytes(header, data))
    with pytest.raises(CheckpointError, match=message):
        read(path)


def test_a_huge_header_length_is_refused_before_it_is_read(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    path.write_bytes((1 << 40).to_bytes(8, "little"))
    with pytest.raises(CheckpointError, match="header of 1099511627776 bytes"):
        read(path)


class TestShards:
    @pytest.fixture
    def folder(self, tmp_path: Path) -> Path:
        write_json(tmp_path / "config.json", CONFIG)
        save_file({"a": WEIGHTS["a"]}, tmp_path / "model-00001-of-00002.safetensors")
        save_file({"b": WEIGHTS["b"]}, tmp_path / "model-00002-of-00002.safetensors")
        self.index(tmp_path)
        return tmp_path

    def index(self, folder: Path, **changes: str) -> None:
        names = {"a": "model-00001-of-00002.safetensors", "b": "model-00002-of-00002.safetensors"}
        write_json(folder / "model.safetensors.index.json", {"weight_map": names | changes})

    def test_reads_across_shards(self, folder: Path) -> None:
        with open_checkpoint(str(folder)) as checkpoint:
            np.testing.assert_array_equal(checkpoint.read_raw("a"), WEIGHTS["a"])
            np.testing.assert_array_equal(checkpoint.read_raw("b", 2, 5), WEIGHTS["b"][2:5])
            assert len(checkpoint.fingerprint()["files"]) == 3

    def test_missing_shard_is_named(self, folder: Path) -> None:
        (folder / "model-00002-of-00002.safetensors").unlink()
        with pytest.raises(CheckpointError, match=r"names the shard model-00002-of-00002.safetensors"):
            open_checkpoint(str(folder))

    def test_missing_tensor_is_named(self, folder: Path) -> None:
        self.index(folder, ghost="model-00001-of-00002.safetensors")
        with pytest.raises(CheckpointError, match=r"tensor ghost is in model-00001.*no file holds it"):
            open_checkpoint(str(folder))

    def test_tensor_in_another_shard_is_named(self, folder: Path) -> None:
        self.index(folder, a="model-00002-of-00002.safetensors", b="model-00001-of-00002.safetensors")
        with pytest.raises(CheckpointError, match=r"tensor a is in model-00002.*it is in model-00001"):
            open_checkpoint(str(folder))

    def test_duplicate_tensor_is_refused(self, folder: Path) -> None:
        save_file({"a": WEIGHTS["a"], "b": WEIGHTS["b"]}, folder / "model-00002-of-00002.safetensors")
        with pytest.raises(CheckpointError, match=r"tensor a is in model-00001.* and in model-00002"):
            open_checkpoint(str(folder))

    def test_truncated_shard_is_found_at_open(self, folder: Path) -> None:
        path = folder / "model-00002-of-00002.safetensors"
        whole = path.read_bytes()
        path.write_bytes(whole[:-1])
        with pytest.raises(CheckpointError, match=f"expected {len(whole)} bytes, got {len(whole) - 1}"):
            open_checkpoint(str(folder))

    @pytest.mark.parametrize("shard", ["../a.safetensors", "/etc/passwd", "..", "C:\\x", "sub/a", "", "."])
    def test_paths_outside_the_folder_are_refused(self, folder: Path, shard: str) -> None:
        self.index(folder, a=shard)
        with pytest.raises(CheckpointError, match="expected plain file names"):
            open_checkpoint(str(folder))

    @pytest.mark.parametrize("content", [{}, {"weight_map": {}}, {"weight_map": ["a"]}])
    def test_index_without_map_is_refused(self, folder: Path, content: Any) -> None:
        (folder / "model.safetensors.index.json").write_text(json.dumps(content))
        with pytest.raises(CheckpointError, match="weight_map"):
            open_checkpoint(str(folder))
