from __future__ import annotations

from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest

from cpm_edge.benchmarks.errors import BenchError
from cpm_edge.benchmarks.peers.gguf_file import gguf_name, unsupported, write_gguf
from cpm_edge.benchmarks.random_checkpoint import write_checkpoint
from cpm_edge.benchmarks.shape import Shape
from cpm_edge.exporter.checkpoint import open_checkpoint
from tests.benchmarks.shapes import TINY, write_shape

WIDE: dict[str, Any] = {"hidden_size": 256, "intermediate_size": 512}


@pytest.mark.parametrize("format_", ["Q4_0", "TQ2_0"])
def test_tensors_formats_and_settings(tmp_path: Path, format_: str) -> None:
    shape = Shape.open(str(write_shape(tmp_path, **WIDE)))
    write_checkpoint(shape, tmp_path / "checkpoint", ternary=format_ == "TQ2_0")
    write_gguf(tmp_path / "checkpoint", tmp_path / "model.gguf", format_)
    reader = gguf.GGUFReader(tmp_path / "model.gguf")
    tensors = {tensor.name: tensor for tensor in reader.tensors}
    with open_checkpoint(str(tmp_path / "checkpoint")) as source:
        assert set(tensors) == {gguf_name(name) for name in source.tensors}
        for name in source.tensors:
            tensor, expected = tensors[gguf_name(name)], source.read(name)
            got = gguf.quants.dequantize(tensor.data, tensor.tensor_type)
            assert got.shape == expected.shape
            if "layers" in name and expected.ndim == 2:
                assert tensor.tensor_type.name == format_
            elif expected.ndim == 2:
                assert tensor.tensor_type.name == "Q8_0"
                np.testing.assert_allclose(got, expected, atol=np.abs(expected).max() / 100)
            else:
                np.testing.assert_array_equal(got, expected)
    settings = {name: field.contents() for name, field in reader.fields.items()}
    assert settings["minicpm.block_count"] == settings["minicpm.attention.head_count_kv"] == 2
    assert settings["minicpm.residual_scale"] == pytest.approx(1.4 / 2**0.5)


def test_what_llama_cpp_cannot_have() -> None:
    assert unsupported({**TINY, **WIDE}, "TQ2_0") is None
    assert unsupported(TINY, "Q4_0") is None
    assert unsupported(TINY, "TQ2_0") == "TQ2_0 packs 256 columns together, which does not divide 128"
    assert unsupported({**TINY, "architectures": ["OtherLM"]}, "Q4_0") == "no GGUF writer for OtherLM"


def test_an_unsupported_shape_is_refused(tmp_path: Path) -> None:
    write_checkpoint(Shape.open(str(write_shape(tmp_path))), tmp_path / "checkpoint")
    with pytest.raises(BenchError, match="TQ2_0 packs 256"):
        write_gguf(tmp_path / "checkpoint", tmp_path / "model.gguf", "TQ2_0")
    assert not (tmp_path / "model.gguf").exists()
